"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Theme: as the system has it, then the two fixed ones. Storage may be forbidden for a local file.
  const button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  const recall = () => { try { return localStorage.getItem("report-theme"); } catch { return null; } };
  const keep = (theme) => { try { localStorage.setItem("report-theme", theme); } catch { /* not kept */ } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" }[theme];
    button.dataset.theme = theme;
  };
  show(themes.includes(recall()) ? recall() : "auto");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
    show(next);
    keep(next);
  });

  // Tables: a click on a head sorts; missing values stay last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const numeric = head.classList.contains("num");
      const key = (row) => row.cells[i].dataset.key;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    }));
  }

  // Numbers as lit_eval/formats.py writes them, nearly.
  const number = (v) => {
    if (v === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(v)));
    const text = size < -4 || size >= 9
      ? v.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e")
      : v.toLocaleString("en", { minimumFractionDigits: Math.max(0, Math.min(4, 4 - size)), maximumFractionDigits: Math.max(0, Math.min(8, 4 - size)) });
    return text.replace(/-/g, "−");
  };
  const count = (v) => Number.isInteger(v) ? v.toLocaleString("en") : number(v);

  // Charts: the pointer or the arrow keys pick a place; the values there are shown, and read out.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const place = ([low, high, log], v) => log
    ? (Math.log(Math.max(v, 1e-300)) - Math.log(low)) / (Math.log(high) - Math.log(low)) : (v - low) / (high - low);
  const value = ([low, high, log], share) => log
    ? Math.exp(Math.log(low) + share * (Math.log(high) - Math.log(low))) : low + share * (high - low);

  for (const chart of document.querySelectorAll(".chart")) {
    const plot = chart.querySelector(".plot");
    const facts = JSON.parse(chart.querySelector('script[type="application/json"]').textContent);
    const live = make("p", "live");
    live.setAttribute("aria-live", "polite");
    chart.append(live);
    let drawn = [], at = null;
    const clear = () => { drawn.forEach((element) => element.remove()); drawn = []; };
    const add = (element, left, top) => {
      if (left !== undefined) element.style.left = `${100 * left}%`;
      if (top !== undefined) element.style.top = `${100 * top}%`;
      plot.append(element);
      drawn.push(element);
      return element;
    };
    const tip = (head, rows, left, aloud) => {
      const box = make("div", "tip");
      box.append(make("p", "", head));
      for (const [style, name, text] of rows) {
        const row = make("div", style);
        row.append(make("span", "", name), make("b", "", text));
        box.append(row);
      }
      add(box);
      const width = plot.clientWidth, mine = box.offsetWidth;
      const wanted = left * width + (left < 0.5 ? 14 : -mine - 14);
      box.style.left = `${Math.max(-40, Math.min(width - mine, wanted))}px`;
      if (aloud) live.textContent = `${head}: ${rows.map(([, name, text]) => `${name} ${text}`).join(", ")}`;
    };
    const showLines = (x, aloud) => {
      clear();
      const near = facts.lines.map((line) => nearest(line.x, x));
      let best = 0;
      facts.lines.forEach((line, i) => {
        if (Math.abs(line.x[near[i]] - x) < Math.abs(facts.lines[best].x[near[best]] - x)) best = i;
      });
      const reach = (facts.x[1] - facts.x[0]) / 25;
      at = facts.lines[best].x[near[best]];
      add(make("div", "cursor"), place(facts.x, at));
      const rows = [];
      facts.lines.forEach((line, i) => {
        const k = near[i];
        if (!facts.x[2] && Math.abs(line.x[k] - at) > reach) return;
        add(make("span", `spot ${line.style}`), place(facts.x, line.x[k]), 1 - place(facts.y, line.y[k]));
        let text = number(line.y[k]);
        if (line.low) text += ` (${number(line.low[k])} to ${number(line.high[k])})`;
        rows.push([line.style, line.name, text]);
        if (line.right && line.y[k] < 700) rows.push(["", line.right.toLowerCase(), number(Math.exp(line.y[k]))]);
      });
      const first = facts.lines[best];
      const step = first.steps ? `step ${count(first.steps[near[best]])}` : "";
      const where = facts.title.toLowerCase().startsWith("step") ? "" : `${count(at)} ${facts.title.toLowerCase()}`;
      tip([step, where].filter(Boolean).join(", ") || count(at), rows, place(facts.x, at), aloud);
    };
    const showPoint = (i, aloud) => {
      clear();
      const point = facts.points[i];
      at = i;
      const left = place(facts.x, point.x);
      tip(point.name, [["", facts.title, count(point.x)], ["", chart.querySelector(".unit").textContent, number(point.y)]], left, aloud);
    };
    const hover = (event) => {
      const box = plot.getBoundingClientRect();
      const left = (event.clientX - box.left) / box.width, top = (event.clientY - box.top) / box.height;
      if (facts.lines) return showLines(value(facts.x, Math.min(1, Math.max(0, left))), false);
      const far = (p) => ((place(facts.x, p.x) - left) * box.width) ** 2 + ((1 - place(facts.y, p.y) - top) * box.height) ** 2;
      let best = 0;
      facts.points.forEach((p, i) => { if (far(p) < far(facts.points[best])) best = i; });
      showPoint(best, false);
    };
    plot.addEventListener("pointermove", hover);
    plot.addEventListener("pointerdown", hover);
    plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch" && document.activeElement !== plot) clear();
    });
    document.addEventListener("pointerdown", (event) => { if (!plot.contains(event.target)) clear(); });
    plot.addEventListener("blur", clear);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) step(0); });
    const longest = facts.lines && facts.lines.reduce((a, b) => (a.x.length >= b.x.length ? a : b));
    const step = (by) => {
      if (!facts.lines) return showPoint(((at ?? 0) + by + facts.points.length) % facts.points.length, true);
      const k = at === null ? longest.x.length - 1 : nearest(longest.x, at) + by;
      showLines(longest.x[Math.max(0, Math.min(longest.x.length - 1, k))], true);
    };
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -20, PageUp: 20, Home: -1e9, End: 1e9 }[event.key];
      if (event.key === "Escape") clear();
      if (by === undefined) return;
      event.preventDefault();
      step(!facts.lines ? Math.sign(by) : by);
    });
  }

  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((element) => { element.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((element) => { element.open = false; }));
})();
