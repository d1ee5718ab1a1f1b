// The conversation as it is seen, and the turn that is being written.

import { Refused, cancel, forget, respond, resume } from "./api.js";
import { Conversation } from "./conversation.js";
import { finishedLength, render } from "./markdown.js";

const PAGE = 20;
const $ = (id) => document.getElementById(id);

const conversation = new Conversation();
let running = null; // {turn, lasting, stopped, aborter, ended}
let following = true;
let lasting = false;

/** Whether answers may go on without the page; see `respond`. */
export function setLasting(on) {
  lasting = on;
}

export function startChat() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("message").value.trim());
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("composer").requestSubmit();
    }
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", startAnew);
  $("earlier").addEventListener("click", showEarlier);
  $("follow").addEventListener("click", () => follow(true));
  $("log").addEventListener("scroll", () => {
    const log = $("log");
    following = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    $("follow").hidden = following || !running;
  });
  new ResizeObserver(keepUp).observe($("log"));
  showAll();
  addEventListener("pagehide", () => conversation.save());
  const last = conversation.turns.at(-1);
  if (last && !last.done) takeUp(last, [...$("turns").children].at(-1).view);
}

async function send(text) {
  if (!text || running) return;
  $("message").value = "";
  const turn = conversation.add(text);
  $("spoken").textContent = "";
  const body = {
    input: conversation.messages,
    session_id: conversation.sessionId,
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    max_output_tokens: Number($("max-tokens").value),
  };
  const view = show(turn);
  follow(true);
  const aborter = new AbortController();
  const events = respond(body, $("slo-class").value, lasting, aborter.signal);
  await start(turn, view, events, performance.now(), { lasting, aborter });
}

// The page was left while an answer was under way.
function takeUp(turn, view) {
  if (turn.id && turn.lasting) return start(turn, view, resume(turn.id, turn.seen), null, { lasting: true });
  turn.done = true;
  turn.wrong = "the page was left in the middle of it";
  finish(turn, view);
}

// `begin`: when it was asked for, if it was just now.
function start(turn, view, events, begin, how) {
  const mine = (running = { turn, stopped: false, ...how });
  turn.lasting = how.lasting;
  setBusy(true);
  mine.ended = write(mine, view, events, begin).finally(() => {
    turn.done = true;
    running = null;
    setBusy(false);
    conversation.save();
    finish(turn, view);
  });
  return mine.ended;
}

async function write(mine, view, events, begin) {
  const turn = mine.turn;
  let first = null;
  let spoken = 0;
  const draw = throttled(() => {
    render(view.answer, turn.said, !turn.done);
    keepUp();
  });
  try {
    for await (const event of events) {
      turn.seen = event.sequence_number;
      if (event.type === "response.created") {
        turn.id = event.response.id;
        conversation.save();
        if (mine.stopped) end(mine);
      }
      if (event.type === "response.output_text.delta" && !mine.stopped) {
        first ??= performance.now();
        turn.said += event.delta;
        spoken = speak(turn.said, spoken);
        draw();
      }
      if (event.response?.usage) turn.facts = facts(event.response, begin, first, mine.stopped);
      if (event.type === "response.failed") turn.wrong = event.response.error.message;
    }
  } catch (error) {
    if (mine.stopped && error.name === "AbortError") turn.facts = "stopped by you";
    else turn.wrong = error instanceof Refused ? error.message : `something went wrong: ${error.message}`;
  }
  $("spoken").textContent = turn.said.slice(spoken) + (turn.wrong ? ` ${turn.wrong}` : "");
}

function stop() {
  if (!running || running.stopped) return;
  running.stopped = true;
  $("stop").setAttribute("aria-disabled", "true");
  if (!running.lasting || running.turn.id) end(running);
}

// With the connection or, where it goes on without one, by name.
function end(mine) {
  if (!mine.lasting) return mine.aborter.abort();
  cancel(mine.turn.id).catch((error) => {
    // It may have ended by itself meanwhile.
    if (running === mine) $("spoken").textContent = mine.turn.wrong = `it could not be stopped: ${error.message}`;
  });
}

async function startAnew() {
  stop();
  await running?.ended;
  const before = conversation.clear();
  $("turns").replaceChildren();
  showAll();
  $("message").focus();
  await forget(before).catch(() => {});
}

function facts(response, begin, first, stopped) {
  const usage = response.usage;
  const found = [];
  const drafts = usage.output_tokens_details ?? {};
  if (first !== null && begin !== null) {
    const seconds = (performance.now() - first) / 1000;
    found.push(`first token after ${Math.round(first - begin)} ms`);
    if (usage.output_tokens > 1 && seconds > 0) found.push(`${((usage.output_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  found.push(`${usage.output_tokens} tokens`);
  found.push(`${usage.input_tokens_details?.cached_tokens ?? 0} of ${usage.input_tokens} prompt tokens cached`);
  if (drafts.accepted_prediction_tokens) found.push(`${drafts.accepted_prediction_tokens} draft tokens accepted`);
  found.push(stopped ? "stopped by you" : ended(response));
  return found.join(" · ");
}

function ended(response) {
  if (response.stop_reason) return `stopped: ${response.stop_reason}`;
  return { completed: "complete", incomplete: "stopped: length", cancelled: "cancelled", failed: "failed" }[response.status];
}

// Whole sentences only, so that a screen reader is not interrupted by each token.
function speak(text, spoken) {
  const end = finishedLength(text);
  if (end > spoken) $("spoken").textContent = text.slice(spoken, end);
  return Math.max(end, spoken);
}

function showAll() {
  $("turns").replaceChildren();
  conversation.turns.slice(-PAGE).forEach((turn) => show(turn));
  $("earlier").hidden = conversation.turns.length <= PAGE;
  $("empty").hidden = conversation.turns.length > 0;
  follow(true);
}

function showEarlier() {
  const log = $("log");
  const fromEnd = log.scrollHeight - log.scrollTop;
  const hidden = conversation.turns.length - $("turns").children.length;
  const first = Math.max(hidden - PAGE, 0);
  for (const turn of conversation.turns.slice(first, hidden).reverse()) show(turn, true);
  $("earlier").hidden = first === 0;
  log.scrollTop = log.scrollHeight - fromEnd;
}

function show(turn, before = false) {
  $("empty").hidden = true;
  const item = document.createElement("li");
  const make = (name, text) => {
    const element = document.createElement("div");
    element.className = name;
    element.textContent = text;
    item.append(element);
    return element;
  };
  const view = { item, asked: make("asked", turn.asked), answer: make("answer", ""), end: make("facts", "") };
  item.view = view;
  $("turns")[before ? "prepend" : "append"](item);
  if (turn.done || !turn.said) finish(turn, view);
  else render(view.answer, turn.said, true);
  return view;
}

function finish(turn, view) {
  render(view.answer, turn.said, false);
  view.end.className = turn.wrong ? "wrong" : turn.done ? "facts" : "busy";
  view.end.textContent = turn.wrong ?? turn.facts ?? (turn.done ? "" : "writing");
  keepUp();
}

// Not `disabled`: a button that has the focus keeps it.
function setBusy(busy) {
  $("send").setAttribute("aria-disabled", String(busy));
  $("stop").setAttribute("aria-disabled", String(!busy));
  $("log").setAttribute("aria-busy", String(busy));
  $("follow").hidden = true;
}

function follow(on) {
  following = on;
  $("follow").hidden = true;
  keepUp();
}

function keepUp() {
  if (following) $("log").scrollTop = $("log").scrollHeight;
}

function throttled(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
}
