// Draws the charts of the page from the JSON beside it, and hides what its reader does not want to see.  No network, no storage.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const words = data.words;
  const hidden = new Set(); // indices of keys
  const index = new Map(data.keys.map((key, i) => [key, i]));

  // Okabe and Ito's colours, told apart by colour-blind readers, on light and on dark; then the same with other dashes.
  const COLOURS = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#8c564b"],
    dark: ["#5cb3ff", "#ff8f4d", "#35d0a0", "#f09ac4", "#f0c548", "#9ad7ff", "#c49bff", "#d9a08f"],
  };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const SYMBOLS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star"];

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const theme = () => document.documentElement.dataset.theme;
  const rank = (key) => index.get(key) - (data.original === null || !index.has(data.original) ? 0 : 1);
  const colourOf = (key) => {
    if (key === data.original) return style("--ink");
    const palette = COLOURS[theme()];
    return index.has(key) ? palette[rank(key) % palette.length] : style("--accent");
  };
  const dashOf = (key) => (index.has(key) && key !== data.original ? DASHES[Math.floor(rank(key) / 8) % DASHES.length] : "solid");
  const visible = (key) => key === undefined || key === null || !hidden.has(index.get(key));

  // ---- charts

  function traces(chart) {
    const several = new Map(); // series of one key, as in the charts of engines, get colours of their own
    for (const s of chart.series) several.set(s.key, (several.get(s.key) || 0) + 1);
    return chart.series.map((s, n) => {
      const alone = several.get(s.key) === 1;
      const colour = alone ? colourOf(s.key) : s.style === "dash" ? style("--soft") : COLOURS[theme()][n % 8];
      return chart.kind === "points" ? points(s, colour) : chart.kind === "steps" ? steps(s, colour) : line(s, colour, alone);
    });
  }

  function line(s, colour, alone) {
    if (s.style === "band") return {
      x: s.x, y: s.high, name: s.name, mode: "lines", fill: "tozeroy", fillcolor: faded(colour, 0.15), line: { color: faded(colour, 0.5), width: 1 },
      hovertemplate: "%{y:.3~g}<extra>%{fullData.name}</extra>",
    };
    const label = s.style === "label";
    const trace = {
      x: s.x, y: s.y, name: s.name, mode: label ? "markers+text" : "lines+markers",
      line: { color: colour, width: s.original ? 3 : 2, dash: s.style === "dash" ? "dash" : alone ? dashOf(s.key) : "solid" },
      marker: { color: colour, size: label ? 11 : s.x.length > 40 ? 3 : 6, symbol: SYMBOLS[(rank(s.key) + 8) % 8] },
      hovertemplate: `%{y:.4~g}${s.text ? "<br>%{customdata}" : ""}<extra>%{fullData.name}</extra>`, customdata: s.text && s.text.map(plain),
    };
    if (label) Object.assign(trace, { text: s.x.map(() => plain(s.name)), textposition: "middle right", textfont: { color: style("--ink") } });
    if (s.low && s.high) trace.error_y = {
      type: "data", symmetric: false, array: s.high.map((v, i) => v - s.y[i]), arrayminus: s.low.map((v, i) => s.y[i] - v), color: colour, thickness: 1.5,
    };
    return trace;
  }

  const points = (s, colour) => ({
    x: s.y, y: s.x.map((word, i) => i), name: s.name, mode: "markers", customdata: s.text && s.text.map(plain),
    marker: { color: colour, size: s.original ? 13 : 9, symbol: s.original ? "line-ns-open" : SYMBOLS[(rank(s.key) + 8) % 8], line: { width: s.original ? 3 : 0, color: colour } },
    hovertemplate: "%{x:.4f}<br>%{customdata}<extra>%{fullData.name}</extra>",
  });

  const steps = (s, colour) => ({
    x: s.x, y: s.y, name: s.name, mode: "lines", line: { shape: "hvh", color: colour, width: 2, dash: dashOf(s.key) },
    hovertemplate: "%{y:,}<extra>%{fullData.name}</extra>",
  });

  function heat(chart, frame) {
    const z = chart.frames[frame].z;
    const shown = chart.logZ ? z.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : z;
    const all = shown.flat().filter((v) => v !== null);
    const low = Math.min(...all), high = Math.max(...all);
    const ticks = chart.logZ ? logTicks(low, high) : undefined;
    return [{
      type: "heatmap", x: chart.x.map(String), y: chart.y.map(plain), z: shown, customdata: z, zmin: low, zmax: high, colorscale: "Cividis", xgap: 1, ygap: 1,
      colorbar: { title: { text: plain(chart.zTitle), side: "right" }, thickness: 12, outlinewidth: 0, tickvals: ticks, ticktext: ticks && ticks.map(power) },
      hovertemplate: `%{y}<br>${plain(chart.xTitle)} %{x}<br>${plain(chart.zTitle)} %{customdata:.3~g}<extra></extra>`,
    }];
  }

  const NARROW = 1.7; // decades; below, powers of ten alone would be too few ticks
  // Logarithms of round values between two logarithms: powers of ten, and 2 and 5 times these in a narrow range.
  const logTicks = (low, high) => {
    const ticks = [];
    const step = Math.max(1, Math.ceil((high - low) / 6));
    for (let t = Math.floor(low); t <= high; t += step) {
      for (const times of high - low < NARROW ? [1, 2, 5] : [1]) ticks.push(t + Math.log10(times));
    }
    return ticks.filter((t) => t >= low && t <= high);
  };
  // Of a logarithmic axis; over several decades Plotly's own ticks, one a decade, do.
  const narrowTicks = (values) => {
    const logs = values.filter((v) => v > 0).map(Math.log10);
    const low = Math.min(...logs), high = Math.max(...logs);
    if (!logs.length || high - low >= NARROW) return { dtick: Math.max(1, Math.ceil((high - low) / 8)) };
    const ticks = logTicks(low - 0.3, high + 0.3);
    return { tickvals: ticks.map((t) => 10 ** t), ticktext: ticks.map((t) => (Math.abs(t) < 3.5 ? String(+(10 ** t).toPrecision(1)) : power(t))) };
  };
  const power = (t) => {
    const exponent = Math.floor(t + 1e-9), times = Math.round(10 ** (t - exponent));
    return `${times === 1 ? "" : `${times}·`}10<sup>${String(exponent).replace("-", "−")}</sup>`;
  };
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // Plotly reads some HTML in texts
  const faded = (colour, alpha) => {
    const n = parseInt(colour.slice(1), 16);
    return colour.startsWith("#") && colour.length === 7 ? `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${alpha})` : colour;
  };

  function layout(chart, box) {
    const ink = style("--ink"), soft = style("--soft"), grid = style("--grid");
    const axis = (title, log, values = []) => ({
      title: { text: plain(title), standoff: 8, font: { size: 12, color: soft } }, type: log ? "log" : undefined, gridcolor: grid, linecolor: grid,
      zerolinecolor: grid, automargin: true, exponentformat: "power", tickfont: { size: log ? 11 : 12 }, ...(log ? narrowTicks(values) : {}),
    });
    const all = (coordinate) => (chart.series || []).flatMap((s) => s[coordinate]);
    const out = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: style("--font"), size: 12, color: ink },
      margin: { l: 12, r: 16, t: 12, b: 12 }, height: 340, showlegend: false, hovermode: chart.kind === "lines" && !chart.series.some((s) => s.style === "label") ? "x unified" : "closest",
      hoverlabel: { bgcolor: style("--paper"), bordercolor: style("--line"), font: { color: ink } }, xaxis: axis(chart.xTitle, chart.logX, all("x")), yaxis: axis(chart.yTitle, chart.logY, all("y")),
    };
    if (chart.kind === "points") {
      const names = chart.series[0].x;
      Object.assign(out, { height: 60 + 24 * names.length, xaxis: axis(chart.yTitle, false) });
      out.yaxis = { ...axis("", false), tickvals: names.map((_, i) => i), ticktext: names.map(plain), autorange: "reversed", tickfont: { family: style("--mono"), size: 12 } };
    }
    if (chart.kind === "heat") {
      out.height = Math.max(300, 70 + 20 * chart.y.length);
      out.yaxis = { ...axis(chart.yTitle, false), autorange: "reversed", type: "category" };
      out.xaxis.type = "category";
    } else if (chart.kind === "lines" && typeof chart.series[0].x[0] === "string") out.xaxis.type = "category";
    if (chart.kind !== "heat" && new Set(chart.series.map((s) => s.key)).size < chart.series.length) {
      Object.assign(out, { showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 } });
    }
    if (box.clientWidth < 480) out.font.size = 11;
    return out;
  }

  const drawn = new Set();
  function draw(id) {
    const chart = data.charts[id], box = document.getElementById(`chart-${id}`);
    const made = chart.kind === "heat" ? heat(chart, frameOf(id)) : traces(chart).map((t, i) => ({ ...t, visible: visible(chart.series[i].key) }));
    Plotly.react(box, made, layout(chart, box), { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
    drawn.add(id);
  }
  const frameOf = (id) => Number(document.querySelector(`select[data-chart="${id}"]`)?.value || 0);
  const redraw = () => drawn.forEach(draw);

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      seen.unobserve(entry.target);
      draw(entry.target.id.slice("chart-".length));
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".plot").forEach((box) => seen.observe(box));
  document.querySelectorAll("select[data-chart]").forEach((s) => s.addEventListener("change", () => draw(s.dataset.chart)));
  window.addEventListener("beforeprint", () => Object.keys(data.charts).forEach(draw));

  // ---- variants

  function show() {
    document.querySelectorAll(".chip").forEach((chip) => {
      chip.setAttribute("aria-pressed", String(!hidden.has(Number(chip.dataset.key))));
      chip.querySelector(".swatch").style.color = colourOf(data.keys[chip.dataset.key]);
    });
    document.querySelectorAll("tr[data-key]").forEach((row) => row.classList.toggle("hidden", hidden.has(Number(row.dataset.key))));
    document.querySelectorAll("th[data-key]").forEach((head) => {
      const off = hidden.has(Number(head.dataset.key));
      if (head.classList.contains("hidden") === off) return;
      for (const row of head.closest("table").rows) row.cells[head.cellIndex].classList.toggle("hidden", off);
    });
    redraw();
  }
  document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
    const key = Number(chip.dataset.key);
    hidden.has(key) ? hidden.delete(key) : hidden.add(key);
    show();
  }));
  document.querySelector(".all")?.addEventListener("click", () => { hidden.clear(); show(); });

  // ---- light and dark

  const button = document.getElementById("theme");
  function setTheme(name) {
    document.documentElement.dataset.theme = name;
    button.textContent = name === "dark" ? words.light : words.dark;
    button.setAttribute("aria-pressed", String(name === "dark"));
    show();
    document.querySelectorAll(".passage").forEach((box) => box.dispatchEvent(new Event("repaint")));
  }
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  button.addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
  prefersDark.addEventListener("change", (e) => setTheme(e.matches ? "dark" : "light"));

  // ---- tables

  document.querySelectorAll(".copy").forEach((copy) => copy.addEventListener("click", async () => {
    const rows = [...copy.closest(".table").querySelectorAll("tr:not(.hidden)")];
    const text = rows.map((row) => [...row.children].filter((c) => !c.classList.contains("hidden")).map((c) => c.textContent).join("\t")).join("\n");
    await copied(text);
    const said = copy.textContent;
    copy.textContent = words.copied;
    setTimeout(() => { copy.textContent = said; }, 1500);
  }));
  async function copied(text) {
    try { await navigator.clipboard.writeText(text); } catch { // a page from a disk has no clipboard in some browsers
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  // ---- the text

  document.querySelectorAll(".passage").forEach((box) => passage(box, data.passages[box.dataset.passage]));

  function passage(box, p) {
    const select = box.querySelector(".which"), tokens = box.querySelector(".tokens"), card = box.querySelector(".card");
    const names = Object.keys(p.top).filter((name) => name !== data.original);
    names.forEach((name) => select.add(new Option(name, name)));
    const all = Object.values(p.kl).flat().filter((v) => v > 0).map(Math.log10).sort((a, b) => a - b);
    const low = all.length ? all[Math.floor(all.length * 0.5)] : 0, high = all.length ? all[Math.floor(all.length * 0.995)] : 1;
    box.querySelector(".low").textContent = (10 ** low).toExponential(0);
    box.querySelector(".high").textContent = (10 ** high).toPrecision(2);
    box.querySelector(".scale").classList.toggle("hidden", !all.length);
    const breaks = new Set(p.breaks);
    const spans = p.pieces.map((piece, i) => {
      if (breaks.has(i)) tokens.append(document.createElement("hr"));
      const span = document.createElement("span");
      span.setAttribute("role", "option");
      span.dataset.i = i;
      span.textContent = piece === "\n" ? "↵\n" : piece || "∅";
      if (!piece.trim()) span.classList.add("space");
      tokens.append(span);
      return span;
    });
    let at = 0;
    function paint() {
      const kl = p.kl[select.value];
      spans.forEach((span, i) => {
        const t = kl && kl[i] > 0 ? Math.min(1, Math.max(0, (Math.log10(kl[i]) - low) / (high - low || 1))) : 0;
        span.style.background = t ? `rgba(${style("--hot")}, ${(0.85 * t).toFixed(3)})` : "";
      });
      tell();
    }
    function tell() {
      spans.forEach((span, i) => { span.classList.toggle("at", i === at); span.setAttribute("aria-selected", String(i === at)); });
      const kl = p.kl[select.value], parts = [element("p", "context", `…${p.pieces.slice(Math.max(0, at - 5), at + 1).join("")} ▸`)];
      if (kl && kl[at] !== null) parts.push(element("p", "", words.kl.replace("{kl}", Number(kl[at]).toPrecision(3))));
      for (const name of [data.original, select.value]) if (name && p.top[name]) parts.push(element("h3", "", name), chances(p.top[name][at]));
      if (p.next.length && p.next[at] !== null) parts.push(element("p", "note", words.next.replace("{token}", () => JSON.stringify(p.next[at]))));
      card.replaceChildren(...parts);
    }
    function chances(rows) {
      const list = document.createElement("ol");
      for (const [piece, chance] of rows) {
        const item = document.createElement("li");
        item.style.setProperty("--share", `${100 * chance}%`);
        item.append(element("span", "", JSON.stringify(piece).slice(1, -1)), element("span", "", `${(100 * chance).toFixed(1)}%`));
        list.append(item);
      }
      return list;
    }
    const go = (i) => { at = Math.min(spans.length - 1, Math.max(0, i)); tell(); };
    for (const kind of ["pointerover", "click"]) tokens.addEventListener(kind, (e) => { if (e.target.dataset.i) go(Number(e.target.dataset.i)); });
    tokens.addEventListener("keydown", (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -spans.length, End: spans.length }[e.key];
      if (step === undefined) return;
      e.preventDefault();
      go(at + step);
      spans[at].scrollIntoView({ block: "nearest" });
    });
    select.addEventListener("change", paint);
    box.addEventListener("repaint", paint);
  }
  function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    made.textContent = text;
    return made;
  }

  setTheme(prefersDark.matches ? "dark" : "light");
})();
