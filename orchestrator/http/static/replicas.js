// Table of replicas, refreshed while the page is visible.

import { byId, element, number } from "./dom.js";

const PERIOD_MS = 2000;

/** Keeps the table current. A refused key stops it until `refresh` is called. */
export class Replicas {
  #client;
  #timer = 0;

  constructor(client) {
    this.#client = client;
    document.addEventListener("visibilitychange", () => !document.hidden && this.refresh());
  }

  async refresh() {
    clearTimeout(this.#timer);
    const note = byId("replicas-note");
    let isRefused = false;
    try {
      show((await this.#client.get("v1/replicas")).data);
      note.textContent = "";
    } catch (error) {
      isRefused = error.status === 401 || error.status === 403;
      note.textContent = isRefused ? "Enter an API key to see the replicas." : error.message;
      byId("replicas").tBodies[0].replaceChildren();
    }
    clearTimeout(this.#timer);
    if (!isRefused && !document.hidden) {
      this.#timer = setTimeout(() => this.refresh(), PERIOD_MS);
    }
  }
}

function show(replicas) {
  const rows = replicas.map((replica) => {
    const isReady = replica.state === "ready";
    const state = element("span", { class: `state ${isReady ? "good" : "bad"}` }, replica.state);
    const why = replica.refused ? [element("small", {}, ` ${replica.refused}`)] : [];
    const others = replica.num_generations - replica.num_own_generations;
    return element(
      "tr", {},
      element("td", {}, replica.tier),
      element("th", { scope: "row" }, replica.address),
      element("td", {}, state, ...why),
      element("td", { class: "model", title: replica.model ?? "" }, baseName(replica.model)),
      element("td", {}, replica.device ?? "–"),
      element("td", { class: "num" }, `${replica.num_generations}${others > 0 ? ` (${others} of others)` : ""}`),
      element("td", { class: "num" }, number(replica.mean_num_rows, 1)),
      element("td", { class: "num" }, replica.step_ms === null ? "–" : `${replica.step_ms.toFixed(1)} ms`),
      element("td", { class: "num" }, number(replica.acceptance_rate, 2)),
    );
  });
  byId("replicas").tBodies[0].replaceChildren(...rows);
}

const baseName = (model) => model?.split("/").filter(Boolean).slice(-2).join("/") ?? "–";
