// Keys for the buttons, and the next pair without loading the page anew. Without this file the
// forms work as forms do.
"use strict";

let sending = false;

// The reader hears what was stored; the place on the page and the focus go to the new pair.
async function send(form, button) {
  if (sending) return;
  sending = true;
  const status = document.getElementById("status");
  const body = new URLSearchParams(new FormData(form));
  if (button && button.name) body.append(button.name, button.value);
  try {
    const reply = await fetch(form.action, { method: "POST", body, redirect: "follow" });
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    if (!reply.ok) {
      status.textContent = "Not saved: " + (page.body.textContent.trim() || reply.status);
      return;
    }
    const open = document.getElementById("help")?.open;
    const main = document.importNode(page.getElementById("main"), true);
    document.getElementById("main").replaceWith(main);
    document.title = page.title;
    if (open) document.getElementById("help").open = true;
    showSwitch();
    main.classList.add("new");
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
    status.textContent = page.getElementById("status").textContent;
  } catch {
    status.textContent = "Not saved: the server does not answer. Your choice is still here; try again.";
  } finally {
    sending = false;
  }
}

// Single keys are in the way of speech input and of some screen readers: they can be switched off.
const keysAreOn = () => localStorage.getItem("keys") !== "off";

function showSwitch() {
  const label = document.getElementById("keys");
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

document.addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target, event.submitter);
});

document.addEventListener("keydown", (event) => {
  if (!keysAreOn() || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const typing = event.target instanceof HTMLInputElement && event.target.type === "text";
  if (typing) {
    // Enter in the note would press the first button, which is a verdict.
    if (event.key === "Enter") event.preventDefault();
    if (event.key === "Escape" || event.key === "Enter") document.getElementById("main").focus();
    return;
  }
  if (event.key === "?") {
    const help = document.getElementById("help");
    help.open = !help.open;
    if (help.open) help.querySelector("summary").focus();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
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
