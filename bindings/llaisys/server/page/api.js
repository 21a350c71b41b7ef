// The server's API, which is OpenAI's, and its errors in words.

/** What went wrong, as a sentence for the reader. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds after which the server asks to be asked again
  }
}

/** Whether the server is up: "ok", or a sentence that says why not. */
export async function health() {
  try {
    const response = await fetch("health");
    if (response.ok) return "ok";
    return response.status === 503
      ? "The server is starting up or shutting down. Trying again …"
      : `The server is not well (status ${response.status}). Trying again …`;
  } catch {
    return "The server cannot be reached. Trying again …";
  }
}

/** The models' descriptions. */
export async function models(key) {
  const response = await request("v1/models", key);
  return (await response.json()).data;
}

/** Yields the chunks of a streamed answer. session names what shares a cached prefix, for a balancer to hash. */
export async function* stream(body, session, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    signal,
    headers: { "X-Session-Id": session },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new ApiError(chunk.error.message || "The server gave up on this answer.");
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

async function request(address, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (key && /[^\x20-\x7e]/.test(key)) throw new ApiError("The API key has characters that no key has.", { status: 401 });
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

const REASONS = {
  401: "The server asks for an API key.",
  404: "The server does not know this model or address.",
  413: "This conversation is too large for the server.",
  429: "The server is busy with others.",
  500: "The server failed.",
  503: "The server is starting up or shutting down.",
};

async function refusal(response) {
  const { status } = response;
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  const said = await response.json().then((body) => body.error?.message, () => null);
  const reason = REASONS[status] ?? (said ? "" : `The server answered with status ${status}.`);
  const wait = retryAfter ? `Try again in ${retryAfter} s.` : "";
  const words = [reason, typeof said === "string" ? said : "", wait].filter(Boolean).join(" ");
  return new ApiError(words, { status, retryAfter });
}

/** Yields the data of server-sent events; see https://html.spec.whatwg.org/multipage/server-sent-events.html. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection was lost in the middle of the answer.");
    });
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      if (line || !data.length) continue;
      yield data.join("\n");
      data = [];
    }
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is not JSON.");
  }
}
