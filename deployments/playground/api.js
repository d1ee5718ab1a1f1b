// The server's API, as far as the page uses it.

const RETRIES_S = [0.3, 1, 2, 4, 8, 8, 8];
const ENDS = new Set(["response.completed", "response.incomplete", "response.failed"]);

let apiKey = sessionStorage.getItem("key") ?? "";

export function setKey(key) {
  apiKey = key;
  sessionStorage.setItem("key", key);
}

/** What the server said against a request. */
export class Refused extends Error {}

/** One request; relative to the page, wherever the server is mounted. */
export async function ask(path, { headers = {}, ...options } = {}) {
  const key = apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
  const answer = await fetch(new URL(path, document.baseURI), { ...options, headers: { ...key, ...headers } });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  // A proxy's own words: the server may be back in a moment.
  if (!said && answer.status >= 502) throw new Error(`the server answered ${answer.status}`);
  const wait = answer.headers.get("Retry-After");
  throw new Refused((said?.error?.message ?? `the server answered ${answer.status}`) + (wait ? ` (try again in ${wait} s)` : ""));
}

export async function settings() {
  return (await ask("playground/settings")).json();
}

export async function metrics() {
  return (await ask("metrics")).text();
}

/** Ends a response that goes on without its reader. */
export async function cancel(id) {
  for (let failures = 0; ; failures++) {
    try {
      return await ask(`v1/responses/${id}/cancel`, { method: "POST", keepalive: true });
    } catch (error) {
      if (error instanceof Refused || failures >= RETRIES_S.length) throw error;
      await pause(failures);
    }
  }
}

export function forget(sessionId) {
  return ask(`v1/sessions/${sessionId}`, { method: "DELETE" });
}

/** Starts a response, and yields its events to the last. One that is `lasting` can be taken up again, and must be cancelled;
 * others end with `signal`. */
export async function* respond(body, sloClass, lasting, signal) {
  const headers = { "Content-Type": "application/json", ...(sloClass ? { "X-SLO-Class": sloClass } : {}) };
  const full = { ...body, stream: true, background: lasting };
  const answer = await ask("v1/responses", { method: "POST", headers, body: JSON.stringify(full), signal });
  if (lasting) yield* eventsToTheLast(answer, null, -1);
  else yield* serverSent(answer.body);
}

/** The events of a response behind number `seen`, to the last. */
export async function* resume(id, seen) {
  yield* eventsToTheLast(null, id, seen);
}

async function* eventsToTheLast(answer, id, seen) {
  for (let failures = 0; ; failures++) {
    try {
      answer ??= await ask(`v1/responses/${id}?stream=true`, { headers: { "Last-Event-ID": String(seen) } });
      for await (const event of serverSent(answer.body)) {
        failures = 0;
        id ??= event.response?.id;
        seen = event.sequence_number;
        yield event;
        if (ENDS.has(event.type)) return;
      }
    } catch (error) {
      // What the server refuses it will refuse again; what the network did may pass.
      if (error instanceof Refused) throw error;
    }
    answer = null;
    if (id === null || id === undefined || failures >= RETRIES_S.length) {
      throw new Refused("the connection was lost; the answer may be incomplete");
    }
    await pause(failures);
  }
}

function pause(failures) {
  return new Promise((done) => setTimeout(done, 1000 * RETRIES_S[failures]));
}

async function* serverSent(stream) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = stream.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((entry) => entry.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}
