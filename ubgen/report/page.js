"use strict";
// A click on a column's name sorts its table; cells without a value stay last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent;
      const value = (row) => parseFloat(text(row).replaceAll(",", ""));
      const order = head.classList.contains("num")
        ? (a, b) => value(a) - value(b)
        : (a, b) => text(a).localeCompare(text(b), "en", { numeric: true });
      const rows = [...table.tBodies[0].rows];
      const full = rows.filter((row) => text(row) !== "").sort((a, b) => (up ? order(a, b) : order(b, a)));
      table.tBodies[0].append(...full, ...rows.filter((row) => text(row) === ""));
    });
  });
}
// What is folded on the screen is on paper too.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
