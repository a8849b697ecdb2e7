// One run: its tokens, and the statistics that follow from them. No DOM.

export const ORIGINS = ["accepted", "recovered", "bonus", "plain"];

export class Run {
  tokens = []; // {index, id, text, origin, round, position, logprob, at}
  rounds = []; // {tokens, numDraftTokens, draftSource}
  status = "waiting";
  #startedAt = performance.now();

  /** Adds the choice of one event. Returns the new tokens. */
  add(choice) {
    const at = this.elapsed;
    const details = choice.token_details ?? [];
    const logprobs = choice.logprobs?.token_logprobs ?? choice.logprobs?.content?.map((c) => c.logprob);
    const added = details.map((detail, index) => {
      const round = this.#round(detail);
      const token = {
        index: this.tokens.length + index,
        id: detail.id,
        text: detail.text,
        origin: detail.origin,
        round: detail.round,
        position: round.tokens.length,
        logprob: logprobs?.[index] ?? null,
        at,
      };
      round.tokens.push(token);
      return token;
    });
    this.tokens.push(...added);
    if (choice.finish_reason) this.status = `finished: ${choice.finish_reason}`;
    return added;
  }

  #round(detail) {
    while (this.rounds.length <= detail.round) this.rounds.push({ tokens: [], numDraftTokens: 0 });
    const round = this.rounds[detail.round];
    round.numDraftTokens = detail.num_draft_tokens;
    round.draftSource = detail.draft_source;
    return round;
  }

  get elapsed() {
    return (performance.now() - this.#startedAt) / 1000;
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  get firstTokenS() {
    return this.tokens[0]?.at ?? null;
  }

  get totalS() {
    return this.tokens.at(-1)?.at ?? null;
  }

  /** Rate of the tokens after the first event. */
  get tokensPerS() {
    const later = this.tokens.filter((token) => token.at > this.firstTokenS).length;
    return later ? later / (this.totalS - this.firstTokenS) : null;
  }

  /** Number of tokens by origin. */
  get origins() {
    const counts = Object.fromEntries(ORIGINS.map((origin) => [origin, 0]));
    for (const token of this.tokens) counts[token.origin] = (counts[token.origin] ?? 0) + 1;
    return counts;
  }

  /** α = accepted / (accepted + rejected): draft tokens after the first rejection do not count. */
  get acceptanceRate() {
    const { accepted, recovered } = this.origins;
    return accepted + recovered ? accepted / (accepted + recovered) : null;
  }

  /** τ = 1 + accepted / rounds with draft tokens. */
  get meanAcceptanceLength() {
    const num = this.#drafted.length;
    return num ? 1 + this.origins.accepted / num : null;
  }

  /** Mean number of draft tokens of the rounds after the prompt's. */
  get meanGamma() {
    const later = this.rounds.slice(1);
    return later.length ? later.reduce((sum, round) => sum + round.numDraftTokens, 0) / later.length : null;
  }

  /** For each position of a draft token: how many were verified, and accepted. */
  get positions() {
    const positions = [];
    for (const round of this.#drafted) {
      for (const { origin, position } of round.tokens) {
        if (origin !== "accepted" && origin !== "recovered") continue;
        positions[position] ??= { accepted: 0, verified: 0 };
        positions[position].verified += 1;
        positions[position].accepted += origin === "accepted";
      }
    }
    return positions;
  }

  get #drafted() {
    return this.rounds.filter((round) => round.numDraftTokens > 0);
  }
}

/** Number of equal tokens at the start of two outputs. */
export function numEqual(one, other) {
  const differs = one.tokens.findIndex((token, i) => token.id !== other.tokens[i]?.id);
  return differs < 0 ? one.tokens.length : differs;
}
