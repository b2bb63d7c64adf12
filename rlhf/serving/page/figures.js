// The page of figures: tables out of what the server counted.

import { ask, element, find, kept, Refused } from "/page/common.js";

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const share = ({ part, of }) => (of ? `${percent(part / of)} (${part} of ${of})` : "–");

function table(caption, heads, rows) {
  const made = document.createElement("table");
  made.append(element("caption", caption));
  const head = made.createTHead().insertRow();
  for (const name of heads) head.append(element("th", name, { scope: "col" }));
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((value, column) => line.append(column ? element("td", value) : element("th", value, { scope: "row" })));
  }
  const scroll = element("div", "", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" });
  scroll.append(made);
  return scroll;
}

function show(found) {
  const { agreement } = found;
  const agreed = agreement
    ? `Agreement (Krippendorff's alpha): ${agreement.alpha.toFixed(3)}, 95 % interval ${agreement.low.toFixed(3)} to ${agreement.high.toFixed(3)}, ` +
      `of ${agreement.pairs} pairs that several rated`
    : "Agreement cannot be told: no two rated the same pairs with different results";
  const decisions = Object.entries(found.decisions).map(([name, count]) => `${name} ${count}`).join(", ");
  find("figures").replaceChildren(
    element("p", `${found.pairs} pairs rated (${decisions || "none"}), ${found.complete} complete; ${found.waiting} ratings wait to become data.`),
    element("p", agreed),
    table(
      "Versions: how often one wins against another (Bradley-Terry, a tie is half a win)",
      ["Version", "Win rate", "95 % interval", "Won", "Lost", "Neither"],
      found.versions.map((one) => [one.version, percent(one.rate), `${percent(one.low)} to ${percent(one.high)}`, one.wins, one.losses, one.ties]),
    ),
    table(
      "Raters",
      ["Rater", "Ratings", "Skipped", "Seconds", "Gold pairs right", "Same again", "Left side"],
      found.raters.map((one) => [
        one.name,
        one.ratings,
        one.skipped,
        one.seconds === null ? "–" : one.seconds.toFixed(1),
        share(one.gold),
        share(one.repeats),
        share(one.left),
      ]),
    ),
    table("Ratings a day (UTC)", ["Day", "Ratings"], found.days.slice().reverse()),
  );
}

async function load() {
  try {
    show(await ask("/figures/numbers", {}));
    find("status").textContent = "";
    find("enter").hidden = true;
  } catch (error) {
    find("status").textContent = error.message;
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
      find("enter").hidden = false;
      find("key").focus();
    }
  }
}

find("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  kept(window.sessionStorage, "key", find("key").value);
  load();
});

load();
