// The API of the server that this page came from: one chat completion, as it streams in.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// Yields the chunks of POST /v1/chat/completions. Throws ApiError in the server's own words.
export async function* complete(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  let response;
  try {
    response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 500);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.", 0);
}

async function refusal(response) {
  let words = `The server answered with status ${response.status}.`;
  try {
    words = (await response.json()).error.message;
  } catch { /* an answer of something between us and the server: its status must do */ }
  const wait = response.headers.get("Retry-After");
  if (wait) words += ` Try again in ${wait} s.`;
  return new ApiError(words, response.status);
}

// The data of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
