// The page of ratings: one key, one rating. What a rating answers to is its token, so that a form sent twice counts once.

import { ask, element, find, kept, Refused } from "/page/common.js";

const CHOICES = { 1: "a", 2: "b", 3: "tie", 4: "both-bad" };
const ATTEMPTS = 5;
const PANELS = ["reasons", "which", "editing"];

let rater = kept(window.localStorage, "rater");
let shown = null; // the pair on the page
let last = null; // token of the rating that undo takes back
let since = 0;
let busy = false;
let edited = null; // side of the answer that is being edited

function say(text) {
  find("status").textContent = text;
}

function panel(name) {
  for (const one of PANELS) find(one).hidden = one !== name;
  if (!name) edited = null;
}

function enter(needsKey) {
  for (const one of ["task", "standing", "undo", "renew", "finished"]) find(one).hidden = true;
  find("enter").hidden = false;
  if (needsKey) find("with-key").hidden = false;
  find("name").value = rater;
  find(needsKey ? "key" : "name").focus();
}

function show(reply) {
  shown = reply.pair;
  last = reply.last;
  panel(null);
  find("enter").hidden = true;
  find("standing").hidden = false;
  find("task").hidden = shown === null;
  find("undo").hidden = last === null;
  find("who").textContent = reply.rater;
  const { done, left } = reply;
  find("progress").max = Math.max(1, done + left);
  find("progress").value = done;
  find("count").textContent = `${done} of ${done + left}`;
  find("renew").hidden = true;
  find("finished").hidden = shown !== null;
  if (shown === null) return;
  find("prompt").replaceChildren(
    ...shown.prompt.map((turn) => {
      const block = element("div", "", { class: `turn ${turn.role === "user" ? "user" : "other"}` });
      block.append(element("span", turn.role, { class: "role" }), element("p", turn.content, { class: "text", dir: "auto" }));
      return block;
    }),
  );
  find("left").textContent = shown.a;
  find("right").textContent = shown.b;
  since = performance.now();
  window.scrollTo(0, 0);
  find("prompt-title").focus({ preventScroll: true });
}

// The same body is sent until the server has it: it counts once, whatever was lost on the way.
async function send(path, body, said) {
  if (busy) return;
  busy = true;
  try {
    for (let attempt = 1; ; attempt += 1) {
      try {
        const reply = await ask(path, body);
        show(reply);
        say(said);
        return;
      } catch (error) {
        if (error instanceof Refused && error.status < 500) {
          if (error.status === 401 || error.status === 403) enter(true);
          say(error.message);
          if (error.status === 409) find("renew").hidden = false;
          return;
        }
        const why = error instanceof Refused ? error.message : "the server does not answer";
        say(`Not saved yet: ${why}. Trying again …`);
        if (attempt === ATTEMPTS) {
          say(`Not saved: ${why}. Press the key again.`);
          find("renew").hidden = shown !== null;
          return;
        }
        await new Promise((wake) => setTimeout(wake, 500 * attempt));
      }
    }
  } finally {
    busy = false;
  }
}

function vote(choice, more = {}) {
  const seconds = (performance.now() - since) / 1000;
  send("/rate/vote", { rater, token: shown.token, pair: shown.id, choice, seconds, ...more }, "Saved.");
}

function press(key) {
  if (busy) return;
  if (key === "u") {
    if (last !== null) send("/rate/undo", { rater, token: last }, "Taken back: rate it again.");
  } else if (shown === null) {
    return;
  } else if (key in CHOICES) {
    vote(CHOICES[key]);
  } else if (key === "s") {
    panel("reasons");
    find("reasons").querySelector("button").focus();
  } else if (key === "e") {
    panel("which");
    find("which").querySelector("button").focus();
  }
}

function edit(side) {
  panel("editing");
  edited = side;
  find("edit-label").textContent = `Answer ${side.toUpperCase()}, as it should be`;
  find("edit").value = shown[side];
  find("edit").focus();
}

function back() {
  panel(null);
  find("prompt-title").focus();
}

function save() {
  const text = find("edit").value.trim();
  if (!text || text === shown[edited].trim()) say("Nothing was changed.");
  else vote(edited, { edit: text });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && edited && !event.repeat) save();
    return;
  }
  const key = event.key.toLowerCase();
  if (key === "escape" && PANELS.some((name) => !find(name).hidden)) return back();
  if (event.target.matches("input, textarea") || find("standing").hidden) return;
  const choices = ["reasons", "which"].map(find).find((one) => !one.hidden);
  if (choices) {
    const buttons = choices.querySelectorAll("[data-reason], [data-edit]");
    if (/^[1-9]$/.test(key) && buttons[key - 1]) {
      event.preventDefault(); // the digit is no part of the text that is edited next
      buttons[key - 1].click();
    }
  } else if (!edited && /^[1-4seu]$/.test(key)) {
    event.preventDefault();
    press(key);
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { key, reason, edit: side } = button.dataset;
  if (key) press(key);
  else if (reason) vote("skip", { reason });
  else if (side) edit(side);
  else if ("back" in button.dataset) back();
});

find("editing").addEventListener("submit", (event) => {
  event.preventDefault();
  save();
});

find("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = kept(window.localStorage, "rater", find("name").value.trim());
  if (find("key").value) kept(window.sessionStorage, "key", find("key").value);
  begin();
});

find("renew").addEventListener("click", begin);

find("leave").addEventListener("click", () => {
  kept(window.sessionStorage, "key", null);
  find("key").value = rater = "";
  shown = last = null;
  say("");
  enter(false);
});

function begin() {
  send("/rate/next", { rater }, "");
}

if (rater) begin();
else enter(false);
