// What the page does beyond being read: parts open when they are pointed at or printed, and the tables of cases can be
// sorted and filtered. Without it everything is there, of the cases the worst.
"use strict";
(() => {
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of closed) part.open = false;
  });

  const ROWS = 50;
  for (const box of document.querySelectorAll(".cases")) {
    const data = JSON.parse(box.querySelector("script").textContent);
    const [choice, search, limit] = box.querySelectorAll("select, input");
    const count = box.querySelector("output");
    const more = box.querySelector(".more");
    const head = box.querySelector("thead tr");
    const body = box.querySelector("tbody");
    const fixed = [data.cases, data.patients, data.folds, data.voxels];
    let scores, sorted, shown, column = null, descending = false;

    const mean = (row) => scores.reduce((sum, arm) => sum + arm[row], 0);
    const value = (row) => {
      if (column === null) return mean(row);
      return column < fixed.length ? fixed[column][row] : scores[column - fixed.length][row];
    };
    const compare = (one, two) => {
      const [a, b] = [value(one), value(two)];
      if (a === b) return 0;
      if (a === null || b === null) return a === null ? 1 : -1; // what is missing stays last
      const order = typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
      return descending ? -order : order;
    };
    const show = () => {
      const { decimals } = data.choices[choice.value];
      const scale = 10 ** decimals;
      body.replaceChildren(...sorted.slice(0, shown).map((row) => {
        const line = document.createElement("tr");
        const cells = [...fixed.map((list) => list[row]),
          ...scores.map((arm) => (arm[row] === null ? "-" : (arm[row] / scale).toFixed(decimals)))];
        for (const cell of cells) line.insertCell().textContent = cell;
        return line;
      }));
      count.textContent = `${sorted.length} of ${data.cases.length} cases`;
      more.hidden = shown >= sorted.length;
    };
    const select = () => {
      const { decimals, higher, scores: chosen } = data.choices[choice.value];
      scores = chosen;
      if (column === null) descending = !higher; // worst first
      const words = search.value.trim().toLowerCase();
      const bound = limit.value === "" ? null : limit.value * 10 ** decimals;
      sorted = data.cases.map((_, row) => row).filter((row) =>
        (!words || data.cases[row].toLowerCase().includes(words) || data.patients[row].toLowerCase().includes(words)) &&
        (bound === null || scores.some((arm) => arm[row] !== null && (higher ? arm[row] < bound : arm[row] > bound))));
      sorted.sort(compare);
      shown = ROWS;
      show();
    };

    [...head.cells].forEach((cell, number) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        descending = column === number ? !descending : false;
        column = number;
        for (const other of head.cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
        select();
      });
    });
    data.choices.forEach(({ name }, number) => choice.add(new Option(name, number)));
    for (const control of [choice, search, limit]) control.addEventListener("input", select);
    more.addEventListener("click", () => {
      shown += ROWS;
      show();
    });
    box.querySelector(".controls").hidden = false;
    box.querySelector(".without").hidden = true;
    select();
  }
})();
