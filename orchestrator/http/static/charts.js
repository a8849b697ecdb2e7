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
        element("span", { class: "num" }, total ? `${counts[origin]}` : ""),
        element("span", { class: "num share" }, total ? percent(counts[origin] / total) : ""),
      ),
    ),
  );
}

const WIDTH = 360;
const HEIGHT = 132;
const LEFT = 30;
const BOTTOM = 18;
const TOP = 10;
const RIGHT = WIDTH - 6;
const FLOOR = HEIGHT - BOTTOM;
// More bars than this have no room for their values.
const MOST_VALUES = 9;

const text = (x, y, content, anchor) => shape("text", { x, y, "text-anchor": anchor }, content);
const axes = () => shape("path", { class: "axis", d: `M${LEFT} ${TOP}V${FLOOR}H${RIGHT}` });

/** α by position of the draft token in its round: a chart, and a table for screen readers. */
export function drawPositions(run) {
  const positions = run?.positions ?? [];
  const width = (RIGHT - LEFT) / Math.max(positions.length, 5);
  const bars = positions.flatMap(({ accepted, verified }, index) => {
    const share = accepted / verified;
    const x = LEFT + index * width + 0.15 * width;
    const height = share * (FLOOR - TOP - 12);
    const middle = x + 0.35 * width;
    const bar = shape(
      "rect", { class: "value", x, y: FLOOR - height, width: 0.7 * width, height },
      shape("title", {}, `position ${index + 1}: ${accepted} of ${verified} accepted`),
    );
    const isLabelled = positions.length <= MOST_VALUES;
    return [
      bar,
      ...(isLabelled ? [text(middle, FLOOR - height - 4, number(share, 2), "middle")] : []),
      ...(isLabelled || index % 2 === 0 ? [text(middle, HEIGHT - 4, `${index + 1}`, "middle")] : []),
    ];
  });
  const svg = byId("positions");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren(axes(), text(LEFT - 5, FLOOR, "0", "end"), text(LEFT - 5, TOP + 16, "1", "end"), ...bars);
  const rows = positions.map(({ accepted, verified }, index) =>
    element(
      "tr", {},
      element("th", { scope: "row" }, `${index + 1}`),
      element("td", {}, `${accepted} of ${verified}`),
      element("td", {}, number(accepted / verified, 2)),
    ),
  );
  byId("positions-table").tBodies[0].replaceChildren(...rows);
}

/** Tokens over time of both runs. `plain` null: there is no second run. */
export function drawTimes(drafted, plain) {
  const svg = byId("times");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const runs = [[drafted, "drafted"], [plain, "undrafted"]].filter(([run]) => run?.tokens.length);
  const mostS = Math.max(...runs.map(([run]) => run.totalS), 0.001);
  const mostTokens = Math.max(...runs.map(([run]) => run.tokens.length), 1);
  const x = (s) => LEFT + (s / mostS) * (RIGHT - LEFT);
  const y = (num) => FLOOR - (num / mostTokens) * (FLOOR - TOP);
  const parts = [axes(), text(LEFT - 5, FLOOR, "0", "end")];
  if (runs.length) {
    parts.push(
      text(LEFT - 5, TOP + 8, `${mostTokens}`, "end"), text(RIGHT, HEIGHT - 4, seconds(mostS), "end"),
    );
  }
  for (const [run, name] of runs) {
    const steps = run.tokens.map((token, i) => `H${x(token.at).toFixed(1)}V${y(i + 1).toFixed(1)}`);
    parts.push(shape("path", { class: name, d: `M${LEFT} ${FLOOR}${steps.join("")}` }));
  }
  svg.replaceChildren(...parts);
  const told = runs.map(([run, name]) =>
    `${name === "drafted" ? "with" : "without"} drafts: ${run.tokens.length} tokens in ${seconds(run.totalS)}`);
  svg.setAttribute("aria-label", told.length ? `Tokens over time; ${told.join("; ")}` : "Nothing generated yet");
}

const CELL = 11;
const GAP = 2;

/** One column per round: its tokens, and outlines of the draft tokens that were not emitted. */
export function drawRounds(run) {
  const svg = byId("rounds");
  const { scrollLeft, scrollWidth, clientWidth } = svg.parentElement;
  const isAtEnd = scrollLeft + clientWidth >= scrollWidth - CELL;
  const rounds = run?.rounds ?? [];
  const heights = rounds.map((round) => Math.max(round.tokens.length, round.numDraftTokens + 1));
  const most = Math.max(...heights, 4);
  const width = Math.max(rounds.length, 1) * (CELL + GAP);
  const height = most * (CELL + GAP);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "xMinYMax");
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.replaceChildren(...rounds.flatMap((round, column) => {
    const at = (row) => ({ x: column * (CELL + GAP), y: height - (row + 1) * (CELL + GAP) + GAP });
    const cells = round.tokens.map((token, row) => cell(token.origin, at(row)));
    for (let row = round.tokens.length; row < round.numDraftTokens; row += 1) {
      cells.push(cell("unused", at(row)));
    }
    return cells;
  }));
  if (isAtEnd) svg.parentElement.scrollLeft = width;
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
