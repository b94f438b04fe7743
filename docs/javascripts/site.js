// What the theme leaves out for those who read by keyboard or screen reader: it makes these boxes while the page runs.
const reachable = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) {
    box.tabIndex = 0
  }
  for (const buttons of document.querySelectorAll("nav.md-code__nav:not([role])")) {
    buttons.setAttribute("role", "presentation")
  }
}
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true })
reachable()
