// The turns of the conversation, kept in this tab.

const KEY = "conversation";
const MOST = 400;

// crypto.randomUUID is there on https and on this machine only.
function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
}

/** A turn: {asked, said, done}, and once there is one: facts or wrong, the response's id, and the last event seen. */
export class Conversation {
  constructor() {
    const before = kept();
    this.sessionId = before?.sessionId ?? newId();
    this.turns = before?.turns ?? [];
  }

  add(asked) {
    const turn = { asked, said: "", done: false };
    this.turns.push(turn);
    this.save();
    return turn;
  }

  /** As much of it as there is room for. */
  save() {
    for (let most = MOST; most > 0; most = Math.floor(most / 2)) {
      try {
        sessionStorage.setItem(KEY, JSON.stringify({ sessionId: this.sessionId, turns: this.turns.slice(-most) }));
        return;
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
      }
    }
  }

  clear() {
    const before = this.sessionId;
    sessionStorage.removeItem(KEY);
    this.sessionId = newId();
    this.turns = [];
    return before;
  }

  /** The whole of it as messages, the last question included; questions that were never answered are not part of it. */
  get messages() {
    const last = this.turns.at(-1);
    return this.turns
      .filter((turn) => turn.said || turn === last)
      .flatMap((turn) => [
        { role: "user", content: turn.asked },
        ...(turn.said ? [{ role: "assistant", content: turn.said }] : []),
      ]);
  }
}
