// Calls to the orchestrator: JSON, and completions as server-sent events.

// URLs are relative to the page, so that it works below any path of a proxy.
const COMPLETIONS = { text: "v1/completions", chat: "v1/chat/completions" };

/** An error as it is shown. `param`: the request's field, if it is one. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    const wait = retryAfter ? `; try again in ${retryAfter} s` : "";
    super(`${error.message ?? "no reason given"}${wait}${status ? ` (HTTP ${status})` : ""}`);
    this.status = status;
    this.param = error.param ?? null;
  }
}

/** Client of one orchestrator. The API key is kept in this object only. */
export class Client {
  apiKey = "";

  /** The JSON answer of a GET. */
  async get(path) {
    const response = await this.#fetch(path, {});
    return response.json();
  }

  /**
   * Events of a streamed completion. `kind`: "text" or "chat".
   * Leaving the loop, or `signal`, closes the connection: the server then ends the generation.
   */
  async *stream(kind, body, signal) {
    const response = await this.#fetch(COMPLETIONS[kind], {
      method: "POST",
      body: JSON.stringify(body),
      headers: { "content-type": "application/json" },
      signal,
    });
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error);
      yield event;
    }
    throw new ApiError(0, { message: "the stream broke before the output was complete" });
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.apiKey) headers.authorization = `Bearer ${this.apiKey}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "the orchestrator cannot be reached" });
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }
}

async function errorOf(response) {
  const text = await response.text();
  let error = { message: text.slice(0, 500) };
  try {
    error = JSON.parse(text).error ?? error;
  } catch {
    // Not ours, but a proxy's: shown as it is.
  }
  return new ApiError(response.status, error, response.headers.get("retry-after"));
}

/** Data of each event. Our events have one `data:` line. */
async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice("data: ".length);
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
