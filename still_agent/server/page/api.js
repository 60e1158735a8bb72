// The server's API. The key, where one is needed, is kept for this tab alone (sessionStorage) and
// sent to this server alone.

const KEY = "still-key";

/** What went wrong, in words. `status` is 0 where no answer came. */
export class Failure extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The address of a session, or of what belongs to it; every name has one. */
export const at = (name, what = "") => `/v1/sessions/${encodeURIComponent(name)}${what}`;

/** A JSON answer. Raises Failure. */
export async function ask(method, path, body) {
  return (await answer(method, path, body)).json();
}

/** A turn's events as they come; returns only after the turn is saved.

 Raises Failure, also where the stream breaks off before that: the turn is then undone. */
export async function* turn(path, body, signal) {
  const response = await answer("POST", path, { ...body, stream: true }, signal);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(0, event.error.message, event.error.code);
      yield event;
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
  }
  throw new Failure(0, "The connection broke off; what was not saved by then is undone.");
}

async function answer(method, path, body, signal) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const { message = `The server answered with status ${response.status}.`, code } =
    told?.error ?? {};
  throw new Failure(response.status, message, code);
}

/** The data of server-sent events, one event each. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
