// Charts of the runs: origins, acceptance by position, tokens over time, rounds.

import { byId, element, number, percent, seconds, shape } from "./dom.js";
import { ORIGINS } from "./run.js";

/** Number and share of the tokens of each origin; also the legend. */
export function drawOrigins(run) {
  const counts = run?.origins;
  const total = run?.tokens.length ?? 0;
  byId("origins").replaceChildren(
    ...ORIGINS.map((origin) =>
      element(
        "li", {},
        element("span", { class: `token ${origin}` }, origin),
        element("span", { class: "num" }, total ? `${counts[origin]}` : "–"),
        element("span", { class: "num share" }, total ? percent(counts[origin] / total) : ""),
      ),
    ),
  );
}

/** α by position of the draft token in its round. */
export function drawPositions(run) {
  const rows = (run?.positions ?? []).map(({ accepted, verified }, index) => {
    const share = accepted / verified;
    const bar = shape(
      "svg", { class: "bar", "aria-hidden": "true", viewBox: "0 0 100 8", preserveAspectRatio: "none" },
      shape("rect", { class: "track", width: 100, height: 8 }),
      shape("rect", { class: "value", width: 100 * share, height: 8 }),
    );
    return element(
      "tr", {},
      element("th", { scope: "row" }, String(index + 1)),
      element("td", { class: "num" }, `${accepted} of ${verified}`),
      element("td", {}, bar, element("span", { class: "num" }, number(share, 2))),
    );
  });
  if (!rows.length) rows.push(element("tr", {}, element("td", { colspan: 3 }, "No draft tokens yet")));
  byId("positions").tBodies[0].replaceChildren(...rows);
}

const WIDTH = 480;
const HEIGHT = 132;
const LEFT = 30;
const BOTTOM = 18;

/** Tokens over time of both runs. `plain` null: there is no second run. */
export function drawTimes(drafted, plain) {
  const svg = byId("times");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const runs = [[drafted, "drafted"], [plain, "undrafted"]].filter(([run]) => run?.tokens.length);
  const mostS = Math.max(...runs.map(([run]) => run.totalS), 0.001);
  const mostTokens = Math.max(...runs.map(([run]) => run.tokens.length), 1);
  const x = (s) => LEFT + (s / mostS) * (WIDTH - LEFT - 8);
  const y = (num) => HEIGHT - BOTTOM - (num / mostTokens) * (HEIGHT - BOTTOM - 8);
  const text = (at, down, content, anchor) =>
    shape("text", { x: at, y: down, "text-anchor": anchor }, content);
  const parts = [
    shape("path", { class: "axis", d: `M${LEFT} 8V${y(0)}H${WIDTH - 8}` }),
    text(LEFT - 5, y(0), "0", "end"),
  ];
  if (runs.length) {
    parts.push(
      text(LEFT - 5, 15, String(mostTokens), "end"),
      text(WIDTH - 8, HEIGHT - 4, seconds(mostS), "end"),
    );
  }
  for (const [run, name] of runs) {
    const steps = run.tokens.map((token, i) => `H${x(token.at).toFixed(1)}V${y(i + 1).toFixed(1)}`);
    parts.push(shape("path", { class: name, d: `M${LEFT} ${y(0)}${steps.join("")}` }));
  }
  svg.replaceChildren(...parts);
  const told = runs.map(([run, name]) =>
    `${name === "drafted" ? "with" : "without"} drafts: ${run.tokens.length} tokens in ${seconds(run.totalS)}`);
  svg.setAttribute("aria-label", told.length ? `Tokens over time; ${told.join("; ")}` : "Nothing generated yet");
}

const CELL = 9;
const GAP = 2;

/** One column per round: its tokens, and outlines of the draft tokens that were not emitted. */
export function drawRounds(run) {
  const svg = byId("rounds");
  const rounds = run?.rounds ?? [];
  const heights = rounds.map((round) => Math.max(round.tokens.length, (round.numDraftTokens ?? 0) + 1));
  const most = Math.max(...heights, 4);
  const width = Math.max(rounds.length, 1) * (CELL + GAP);
  const height = most * (CELL + GAP);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.replaceChildren(...rounds.flatMap((round, column) => {
    const at = (row) => ({ x: column * (CELL + GAP), y: height - (row + 1) * (CELL + GAP) + GAP });
    const cells = round.tokens.map((token, row) => cell(token.origin, at(row)));
    for (let row = round.tokens.length; row < (round.numDraftTokens ?? 0); row += 1) {
      cells.push(cell("unused", at(row)));
    }
    return cells;
  }));
  svg.setAttribute("aria-label", rounds.length
    ? `${rounds.length} rounds with ${run.tokens.length} tokens` : "Nothing generated yet");
}

/** Square of a token. Each origin has its own mark besides its colour. */
function cell(origin, { x, y }) {
  const marks = {
    recovered: shape("path", { d: `M${x + 2} ${y + 2}l${CELL - 4} ${CELL - 4}m0 ${4 - CELL}l${4 - CELL} ${CELL - 4}` }),
    bonus: shape("path", { d: `M${x + CELL / 2} ${y + 2}v${CELL - 4}m${2 - CELL / 2} ${2 - CELL / 2}h${CELL - 4}` }),
    plain: shape("circle", { cx: x + CELL / 2, cy: y + CELL / 2, r: 1.4 }),
  };
  const box = shape("rect", { x: x + 0.5, y: y + 0.5, width: CELL - 1, height: CELL - 1, rx: 1.5 });
  return shape("g", { class: origin }, box, ...(marks[origin] ? [marks[origin]] : []));
}
