// Before a page is printed, everything that is folded is opened.
"use strict";

addEventListener("beforeprint", () => {
  for (const node of document.querySelectorAll("details")) node.open = true;
  for (const node of document.querySelectorAll(".toggle-hidden")) node.classList.remove("toggle-hidden");
});
