// The page: its two views, and what the server says of itself.

import { setKey, settings } from "./api.js";
import { setLasting, startChat } from "./chat.js";
import { setLive } from "./live.js";

const $ = (id) => document.getElementById(id);
const TABS = ["chat", "live"];

function select(name) {
  for (const tab of TABS) {
    const chosen = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    $(tab).hidden = !chosen;
  }
  setLive(name === "live");
}

for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => select(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = TABS.find((name) => name !== tab);
    select(other);
    $(`tab-${other}`).focus();
  });
}

async function start() {
  const found = await settings();
  $("model").textContent = found.model;
  document.title = `${found.model} · tailserve`;
  setLasting(found.one_ingress);
  for (const name of found.classes) {
    const option = document.createElement("option");
    option.value = option.textContent = name;
    $("slo-class").append(option);
  }
  $("key-field").hidden = !found.needs_key;
  $("options").open = found.needs_key && !sessionStorage.getItem("key");
  $("key").addEventListener("change", () => setKey($("key").value.trim()));
}

startChat();
start().catch((error) => {
  $("model").textContent = `the server does not answer: ${error.message}`;
});
