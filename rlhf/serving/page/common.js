// What both pages share: asking the server, and building elements out of texts alone.

export const find = (id) => document.getElementById(id);

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// localStorage and sessionStorage fail where a browser keeps nothing
export function kept(storage, name, value) {
  try {
    if (value === null) storage.removeItem(name);
    else if (value !== undefined) storage.setItem(name, value);
    return storage.getItem(name) ?? "";
  } catch {
    return value ?? "";
  }
}

export async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  const key = kept(window.sessionStorage, "key");
  if (key) headers.authorization = `Bearer ${key}`;
  const reply = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  const content = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, content.error?.message ?? `the server answered ${reply.status}`);
  return content;
}

export function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}
