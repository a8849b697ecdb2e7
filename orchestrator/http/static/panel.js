// Panel of one run: figures, the tokens, and a line about the token under the pointer or the keyboard.

import { byId, element, number, percent, seconds } from "./dom.js";

const KEYS = "Left and right arrow: token; up and down: round.";
const MEANING = {
  accepted: "draft token that the target accepted",
  recovered: "target's own token in place of a rejected draft token",
  bonus: "target's own token after all draft tokens were accepted",
  plain: "target's own token of a round without draft tokens",
  replayed: "token read from the session",
};

/** What the line about a token says. */
export function description(token, round) {
  const probability =
    token.logprob === null ? "" : `log-probability ${token.logprob.toFixed(3).replace("-", "−")} ` +
    `(${percent(Math.exp(token.logprob))})`;
  return [
    `${token.index + 1}: ${JSON.stringify(token.text)}`,
    round.draftSource === "lookup" && token.origin === "accepted" ? "accepted, by prompt lookup" : token.origin,
    `round ${token.round} with ${round.numDraftTokens || "no"} draft tokens, token ${token.position + 1}`,
    probability,
  ].filter(Boolean).join(" · ");
}

export class Panel {
  #spans = [];
  #run = null;
  #at = null;

  /** `figures`: the figures shown. */
  constructor(title, note, figures) {
    this.#figures = figures;
    const name = element("h2", {}, title);
    this.status = element("span", { class: "status" });
    this.list = element("dl", { class: "figures" });
    this.output = element("div", {
      class: "tokens", tabindex: "0", role: "group", "aria-label": `Output ${title}. ${KEYS}`,
    });
    this.detail = element("p", { class: "detail" }, note);
    this.element = element(
      "article", { "aria-label": title },
      element("header", {}, name, this.status), this.list, this.output, this.detail,
    );
    this.output.addEventListener("mouseover", (event) => this.#point(event.target));
    this.output.addEventListener("click", (event) => this.#point(event.target));
    this.output.addEventListener("keydown", (event) => this.#key(event));
    this.output.addEventListener("focus", () => this.#at === null && this.#select(0, false));
    this.update();
  }

  #figures;

  /** Empties the panel for a run. */
  begin(run) {
    this.#run = run;
    this.#spans = [];
    this.#at = null;
    this.output.replaceChildren();
    this.detail.textContent = "Point at a token, or focus the output and use the arrow keys.";
    this.update();
  }

  /** Appends tokens of the run. */
  add(tokens) {
    const isAtEnd =
      this.output.scrollTop + this.output.clientHeight >= this.output.scrollHeight - 8;
    for (const token of tokens) {
      const classes = ["token", token.origin];
      if (token.position === 0) classes.push("first");
      if (token.text === "") classes.push("empty");
      if (/^\n+$/.test(token.text)) classes.push("newline");
      const span = element("span", { class: classes.join(" ") }, token.text);
      span.dataset.index = token.index;
      this.#spans.push(span);
    }
    this.output.append(...this.#spans.slice(-tokens.length || this.#spans.length));
    if (isAtEnd) this.output.scrollTop = this.output.scrollHeight;
  }

  /** Shows the figures and the status as they are now. */
  update() {
    this.status.textContent = this.#run?.status ?? "";
    this.list.replaceChildren(
      ...this.#figures.map(([name, title, value]) =>
        element(
          "div", { title },
          element("dt", {}, name, element("span", { class: "sr" }, ` ${title}`)),
          element("dd", {}, this.#run ? value(this.#run) : "–"),
        ),
      ),
    );
  }

  #point(target) {
    const index = target.dataset?.index;
    if (index !== undefined) this.#select(Number(index), false);
  }

  #key(event) {
    const last = this.#spans.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.#at ?? 0;
    const tokens = this.#run.tokens;
    const next = {
      ArrowRight: () => at + 1,
      ArrowLeft: () => at - 1,
      ArrowDown: () => tokens.findIndex((token) => token.round > tokens[at].round),
      ArrowUp: () => tokens.findIndex((token) => token.round >= tokens[at].round - 1),
      Home: () => 0,
      End: () => last,
    }[event.key]?.();
    if (next === undefined) return;
    event.preventDefault();
    this.#select(next < 0 ? (event.key === "ArrowDown" ? last : 0) : Math.min(next, last), true);
  }

  #select(index, isByKey) {
    const span = this.#spans[index];
    if (span === undefined) return;
    const { tokens, rounds } = this.#run;
    for (const marked of this.output.querySelectorAll(".at, .same")) {
      marked.classList.remove("at", "same");
    }
    for (const token of tokens) {
      if (token.round === tokens[index].round) this.#spans[token.index].classList.add("same");
    }
    span.classList.add("at");
    this.#at = index;
    this.detail.textContent = description(tokens[index], rounds[tokens[index].round]);
    this.detail.title = MEANING[tokens[index].origin] ?? "";
    if (isByKey) {
      span.scrollIntoView({ block: "nearest" });
      byId("announcement").textContent = this.detail.textContent;
    }
  }
}

// Name, explanation and value of each figure.
export const PLAIN_FIGURES = [
  ["Tokens", "tokens generated", (run) => `${run.tokens.length}`],
  ["Tokens/s", "after the first tokens", (run) => number(run.tokensPerS, 1)],
  ["First", "time to the first token", (run) => seconds(run.firstTokenS)],
  ["Total", "time to the last token", (run) => seconds(run.totalS)],
];

export const DRAFT_FIGURES = [
  ...PLAIN_FIGURES,
  ["α", "accepted / (accepted + rejected) draft tokens", (run) => number(run.acceptanceRate, 2)],
  ["τ", "tokens per round with drafts", (run) => number(run.meanAcceptanceLength, 2)],
  ["γ", "mean number of draft tokens per round", (run) => number(run.meanGamma, 1)],
  ["Rounds", "passes of the target", (run) => `${run.rounds.length}`],
];
