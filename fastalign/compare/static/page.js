// Keys for the buttons, and the next page without loading it anew: pairs to compare, or the
// conversation, whose answers are written as they are drawn. Without this file the forms work as
// forms do.
"use strict";

const $ = (id) => document.getElementById(id);
const SILENT = "the server does not answer. Your choice is still here; try again.";
let sending = false;

// The reader hears what was stored; the place on the page and the focus go to what is new.
async function send(form, button) {
  if (form.id === "stop") {
    // The page that comes after it is fetched when the answer has ended.
    fetch(form.action, { method: "POST", redirect: "manual" }).catch(() => report("Not stopped: the server does not answer."));
    return;
  }
  if (sending) return;
  sending = true;
  const body = new URLSearchParams(new FormData(form));
  if (button && button.name) body.append(button.name, button.value);
  try {
    // By this header the next page comes at once, without a redirect.
    const headers = { "X-Requested-With": "fetch" };
    await show(await fetch(form.action, { method: "POST", body, headers }));
    while ($("main").dataset.drawing !== undefined) {
      await stream();
      await show(await fetch("/"));
    }
  } catch {
    const drawing = $("main").dataset.drawing !== undefined;
    report(drawing ? "The server does not answer." : "Not saved: " + SILENT);
  } finally {
    sending = false;
  }
}

function report(text) {
  $("status").textContent = text;
  $("status").classList.add("problem");
}

async function show(reply) {
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  if (!reply.ok) {
    report("Not saved: " + (page.body.textContent.trim() || reply.status));
    return;
  }
  const open = $("help")?.open;
  const main = document.importNode(page.getElementById("main"), true);
  $("main").replaceWith(main);
  document.title = page.title;
  if (open) $("help").open = true;
  showSwitch();
  main.classList.add("new");
  if (main.classList.contains("talk")) {
    toTheEnd();
    // With a verdict to give, keys are for it.
    const box = $("verdict") ? null : $("message");
    (box && matchMedia("(hover: hover)").matches ? box : main).focus({ preventScroll: true });
  } else {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
  $("status").className = page.getElementById("status").className;
  $("status").textContent = page.getElementById("status").textContent;
}

// The last turn, and the beginning of its answers.
function toTheEnd() {
  const turns = document.querySelector(".talk .prompt");
  if (turns) turns.scrollTop = turns.scrollHeight;
}

// Answers as they are drawn, from their beginning.
async function stream() {
  const reply = await fetch("/answers", { method: "POST" });
  if (reply.status !== 200) return;
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) piece(...JSON.parse(line));
  }
}

function piece(place, text) {
  const answers = $("answers");
  if (text === "") {
    const answer = $("new-answer").content.cloneNode(true);
    const several = place > 0 || !answers.classList.contains("single");
    answer.querySelector("h2").textContent = several ? "Answer " + "AB"[place] : "Answer";
    if (place > 0) answers.classList.remove("single");
    if (answers.children[place]) answers.children[place].replaceWith(answer);
    else answers.append(answer);
    return;
  }
  // Whoever reads further up is left there.
  const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 40;
  answers.children[place].querySelector(".text").append(text);
  if (atEnd) scrollTo(0, document.documentElement.scrollHeight);
}

// Single keys are in the way of speech input and of some screen readers: they can be switched off.
const keysAreOn = () => localStorage.getItem("keys") !== "off";

function showSwitch() {
  const label = $("keys");
  if (!label) return;
  label.hidden = false;
  label.firstElementChild.checked = keysAreOn();
}

document.addEventListener("change", (event) => {
  if (event.target.parentElement.id === "keys") {
    localStorage.setItem("keys", event.target.checked ? "on" : "off");
  }
});
showSwitch();
toTheEnd();
if ($("main").dataset.drawing !== undefined) {
  // Opened, or loaded again, while an answer is being drawn.
  (async () => {
    sending = true;
    try {
      while ($("main").dataset.drawing !== undefined) {
        await stream();
        await show(await fetch("/"));
      }
    } catch {
      report("The server does not answer.");
    } finally {
      sending = false;
    }
  })();
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target, event.submitter);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const box = event.target;
  if (box instanceof HTMLTextAreaElement) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (box.value.trim()) box.form.requestSubmit();
    }
    if (event.key === "Escape") $("main").focus();
    return;
  }
  if (box instanceof HTMLInputElement && box.type === "text") {
    // Enter in the note would press the first button, which is a verdict.
    if (event.key === "Enter") event.preventDefault();
    if (event.key === "Escape" || event.key === "Enter") $("main").focus();
    return;
  }
  if (!keysAreOn()) return;
  if (event.key === "?") {
    const help = $("help");
    help.open = !help.open;
    if (help.open) help.querySelector("summary").focus();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "m" && $("message")) {
    event.preventDefault();
    $("message").focus();
    return;
  }
  // A long prompt scrolls in its own box while that has the focus.
  if (key.startsWith("Arrow") && event.target.closest(".prompt")) return;
  for (const button of document.querySelectorAll("button[data-keys]")) {
    if (!button.dataset.keys.split(" ").includes(key)) continue;
    event.preventDefault();
    const clearly = button.form.elements.clearly;
    // Of arrows alone: on some keyboards digits need Shift.
    if (clearly && event.shiftKey && key.startsWith("Arrow")) clearly.checked = true;
    send(button.form, button);
    return;
  }
});
