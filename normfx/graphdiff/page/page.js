"use strict";
// The page of a diff. Everything that comes from a model is put in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const ROW = 20;
  const [LINE, VALUE, MODULE, RULE, SITE, SOURCE, READS, OP] = [0, 1, 2, 3, 4, 5, 6, 7];
  const state = { graph: 0, stage: 0, value: -1, site: -1, query: "", hit: -1 };
  let graph, rows = [], shown = [], hits = [], changed = [], atValue = new Map();

  function make(tag, settings = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(settings)) {
      if (key === "text") made.textContent = value;
      else if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  // ------------------------------------------------------------------ the rows of two stages

  function nodeAt(stage, place) {
    return place < 0 ? null : graph.nodes[graph.stages[stage].nodes[place]];
  }

  function earlier() {
    return $("beside").value === "first" ? 0 : Math.max(state.stage - 1, 0);
  }

  function load() {
    const flat = graph.rows[`${earlier()}-${state.stage}`] || [];
    rows = [];
    for (let i = 0; i < flat.length; i += 2) {
      const before = nodeAt(earlier(), flat[i]), after = nodeAt(state.stage, flat[i + 1]);
      rows.push({ before, after, changed: !before || !after || before[LINE] !== after[LINE] });
    }
    atValue = new Map();
    rows.forEach((row, i) => [row.before, row.after].forEach((n) => n && atValue.set(n[VALUE], i)));
    changed = [];
    rows.forEach((row, i) => { if (row.changed && !(i && rows[i - 1].changed)) changed.push(i); });
    select();
  }

  function select() {
    const query = state.query.toLowerCase(), kind = $("filter").value;
    hits = [];
    if (query) rows.forEach((row, i) => { if (matches(row, query)) hits.push(i); });
    if (kind === "all") shown = rows.map((_, i) => i);
    else {
      const wanted = kind === "matches" ? hits : rows.flatMap((row, i) => (row.changed ? [i] : []));
      const around = kind === "matches" ? 0 : 3, keep = new Set();
      for (const i of wanted) for (let k = i - around; k <= i + around; k++) keep.add(k);
      shown = [];
      for (let i = 0; i < rows.length; i++) {
        if (keep.has(i)) shown.push(i);
        else if (shown.length && shown[shown.length - 1] >= 0) shown.push(-1);
      }
    }
    $("found").textContent = query ? `${hits.length} found` : "";
    $("changes").textContent = `${changed.length} change${changed.length === 1 ? "" : "s"}`;
    $("space").style.height = `${shown.length * ROW}px`;
    drawn = "";
    draw();
  }

  const text = (node) => (node ? node[LINE] : "");
  function matches(row, query) {
    const rule = (row.after && row.after[RULE]) || "";
    return text(row.before).toLowerCase().includes(query) || text(row.after).toLowerCase().includes(query) || rule.includes(query);
  }

  // Only the rows in sight are in the page, so that ten thousand scroll like ten.
  let drawn = "";
  function draw() {
    const view = $("view");
    const first = Math.max(0, Math.floor(view.scrollTop / ROW) - 10);
    const last = Math.min(shown.length, first + Math.ceil(view.clientHeight / ROW) + 20);
    const key = [first, last, state.value, state.query, state.stage].join();
    if (key === drawn) return;
    drawn = key;
    const own = rows[atValue.get(state.value)];
    const near = new Set(own && own.after ? own.after[READS] : own && own.before ? own.before[READS] : []);
    const made = [];
    for (let i = first; i < last; i++) made.push(shown[i] < 0 ? make("div", { class: "skip", text: "⋯" }) : rowOf(shown[i], near));
    $("rows").style.transform = `translateY(${first * ROW}px)`;
    $("rows").replaceChildren(...made);
  }

  function rowOf(i, near) {
    const row = rows[i], is = (node) => node && node[VALUE] === state.value;
    const here = is(row.before) || is(row.after);
    const close = [row.before, row.after].some((node) => node && near.has(node[VALUE]));
    return make(
      "div",
      { class: `row${here ? " here" : ""}${close ? " near" : ""}${row.changed ? " changed" : ""}`, "data-row": i, onclick: () => choose(i) },
      side(row.before, row.changed, "gone", "−"), side(row.after, row.changed, "new", "+"),
    );
  }

  function side(node, isChanged, kind, sign) {
    if (!node) return make("div", { class: "none" });
    const made = make("div", { class: isChanged ? kind : "", title: node[LINE] }, make("i", { text: isChanged ? sign : "" }));
    made.append(...coloured(node[LINE]));
    return made;
  }

  function coloured(line) {
    if (state.query && line.toLowerCase().includes(state.query.toLowerCase())) return marked(line);
    const parts = /^([^:=]+?)(: .*?)?( = )([^(\s]+)(.*?)(  # .*)?$/.exec(line);
    if (!parts) return [document.createTextNode(line)];
    const kinds = ["v", "t", "", "o", "", "m"];
    return parts.slice(1).map((part, i) => (part ? make("span", { class: kinds[i], text: part }) : "")).filter(Boolean);
  }

  function marked(line) {
    const low = line.toLowerCase(), query = state.query.toLowerCase(), made = [];
    let from = 0;
    for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, from)) {
      made.push(document.createTextNode(line.slice(from, at)), make("mark", { text: line.slice(at, at + query.length) }));
      from = at + query.length;
    }
    return [...made, document.createTextNode(line.slice(from))];
  }

  function reveal(i) {
    let at = shown.indexOf(i);
    if (at < 0) { $("filter").value = "all"; select(); at = shown.indexOf(i); }
    const view = $("view"), top = at * ROW;
    if (top < view.scrollTop + ROW || top > view.scrollTop + view.clientHeight - 3 * ROW) view.scrollTop = Math.max(0, top - view.clientHeight / 3);
    draw();
  }

  function choose(i) {
    const row = rows[i], node = row.after || row.before;
    state.value = node[VALUE];
    const site = [row.after, row.before].find((n) => n && n[SITE] >= 0);
    state.site = site ? site[SITE] : -1;
    reveal(i);
    markSite();
    details(row);
  }

  function step(by) {
    if (!changed.length) return;
    const here = atValue.has(state.value) ? atValue.get(state.value) : -1;
    const next = by > 0 ? changed.find((i) => i > here) : changed.filter((i) => i < here).pop();
    choose(next === undefined ? changed[by > 0 ? 0 : changed.length - 1] : next);
  }

  function nextHit(by) {
    if (!hits.length) return;
    state.hit = (state.hit + by + hits.length) % hits.length;
    choose(hits[state.hit]);
    $("found").textContent = `${state.hit + 1} of ${hits.length}`;
  }

  // ------------------------------------------------------------------ the norms

  function listSites() {
    const wanted = $("sitefilter").value.toLowerCase();
    const items = graph.sites.map((site, i) => {
      const actions = [...new Set(site.records.filter((r) => r[2] && r[0] !== "recognise").map((r) => r[1]))];
      const codes = [...new Set(site.records.filter((r) => r[3]).map((r) => r[3]))];
      if (wanted && !`${site.name} ${site.kind} ${actions} ${codes}`.toLowerCase().includes(wanted)) return null;
      const verdict = actions.length ? actions.join(", ") : "kept";
      return make(
        "li", { "data-site": i, tabindex: 0, onclick: () => chooseSite(i), onkeydown: (e) => { if (e.key === "Enter") chooseSite(i); } },
        make("span", { class: "name", text: site.name }),
        make("span", { class: "verdict", text: `${site.kind}  ` }),
        make("span", { class: `verdict ${actions.length ? "changed" : "kept"}`, text: verdict }),
        codes.length ? make("span", { class: "verdict", text: `  · refused: ${codes.join(", ")}` }) : null,
      );
    }).filter(Boolean);
    const misses = graph.misses.map(([name, code]) => make("li", {}, make("span", { class: "name", text: name }), make("span", { class: "verdict", text: `no norm: ${code}` })));
    const list = document.querySelector("#sites ol");
    list.replaceChildren(...items, ...(wanted ? [] : misses));
    if (!list.children.length) list.append(make("li", { class: "empty", text: "none" }));
    markSite();
  }

  function markSite() {
    document.querySelectorAll("#sites li").forEach((li) => li.setAttribute("aria-current", li.dataset.site === String(state.site)));
  }

  function chooseSite(i) {
    state.site = i;
    const own = rows.findIndex((row) => row.changed && [row.after, row.before].some((n) => n && n[SITE] === i));
    const any = rows.findIndex((row) => [row.after, row.before].some((n) => n && n[SITE] === i));
    if (any >= 0) choose(own >= 0 ? own : any);
    else { state.value = -1; details(null); }
    state.site = i;
    markSite();
  }

  // ------------------------------------------------------------------ the details

  function details(row) {
    const made = [];
    if (row) {
      const node = row.after || row.before;
      made.push(make("h2", { text: node[MODULE] || "no module" }));
      if (row.before && row.changed) made.push(make("div", { class: "code", text: `− ${row.before[LINE]}` }));
      if (row.after) made.push(make("div", { class: "code", text: `${row.changed ? "+ " : ""}${row.after[LINE]}` }));
      made.push(...provenance(node), ...ruleOf(row));
    }
    if (state.site >= 0) made.push(...verdictOf(graph.sites[state.site]), ...drawings(state.site));
    if (!made.length) made.push(make("p", { class: "empty", text: "Choose a line or a norm." }));
    document.querySelector("#detail .scroll").replaceChildren(...made);
  }

  // The last parts of a path tell one file from another; the whole is shown on hovering.
  const tail = (path) => path.split(/[\\/]/).slice(-2).join("/");

  function provenance(node) {
    const frames = node[SOURCE] >= 0 ? graph.sources[node[SOURCE]] : [];
    if (!frames.length) return [];
    const made = [make("h3", { text: "source" })];
    for (const [file, line, where, code] of frames.slice(-3).reverse()) {
      made.push(make("div", { class: "where", title: file, text: `${tail(file)}:${line}, in ${where}` }));
      if (code) made.push(make("div", { class: "code", text: code }));
    }
    return made;
  }

  function ruleOf(row) {
    const names = new Set();
    if (row.after && row.after[RULE]) names.add(row.after[RULE]);
    if (row.after && row.changed) for (const value of row.after[READS]) {
      const source = rows[atValue.get(value)];
      if (source && source.after && source.after[RULE] && source.changed) names.add(source.after[RULE]);
    }
    const made = [];
    for (const name of names) made.push(make("div", { class: "record yes" }, make("b", { text: name }), ...proof(name)));
    return made.length ? [make("h3", { text: "rule" }), ...made] : [];
  }

  function proof(name) {
    const rule = data.rules[name];
    if (!rule) return [];
    const made = [make("p", { text: rule.effect })];
    if (rule.identity) made.push(make("div", { class: "code identity", text: rule.identity }));
    made.push(make("p", { text: `${rule.exactness}: ${rule.promise}. ${rule.source === "identity" ? "" : rule.source}` }));
    return made;
  }

  function verdictOf(site) {
    const facts = [site.kind, site.eps === null ? null : `eps ${site.eps}`, site.dtype, `from ${site.origin}`].filter(Boolean);
    const made = [make("h3", { text: "norm" }), make("h2", { text: site.name }), make("div", { class: "where", text: facts.join(" · ") })];
    if (site.location) made.push(make("div", { class: "where", title: site.location, text: tail(site.location) }));
    for (const [stage, rule, done, code, detail, location] of site.records) {
      const refusal = data.refusals[code];
      made.push(make(
        "div", { class: `record ${done ? "yes" : "no"}` },
        make("b", { text: rule }), make("span", { class: "tag", text: done ? `${stage}: changed` : `refused: ${code}` }),
        detail ? make("p", { text: detail }) : null,
        refusal ? make("p", { text: `${refusal.meaning} ${refusal.hint}` }) : null,
        !done && location ? make("p", { title: location, text: tail(location) }) : null,
        ...(done && stage !== "recognise" ? proof(rule) : []),
      ));
    }
    return made;
  }

  // Drawn when it is looked at, from places that are in the page.
  function drawings(site) {
    const made = [];
    (graph.drawings[site] || []).forEach((drawing, i) => {
      if (!drawing) return;
      const stage = i ? graph.stages.length - 1 : 0;
      made.push(make("h3", { text: `neighbourhood after ${graph.stages[stage].name}` }), make("div", { class: "drawing" }, svgOf(drawing, stage)));
    });
    return made;
  }

  function svg(tag, settings, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(settings)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function svgOf(drawing, stage) {
    const [dx, dy, w, h] = [108, 46, 98, 24];
    const left = Math.min(...drawing.nodes.map((n) => n[1])), right = Math.max(...drawing.nodes.map((n) => n[1]));
    const depth = Math.max(...drawing.nodes.map((n) => n[2]));
    const [width, height] = [(right - left) * dx + w + 16, depth * dy + h + 16];
    const place = ([, across, down]) => [(across - left) * dx + w / 2 + 8, down * dy + h / 2 + 8];
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "neighbourhood" });
    for (const [a, b] of drawing.edges) {
      const [x1, y1] = place(drawing.nodes[a]), [x2, y2] = place(drawing.nodes[b]);
      picture.append(svg("path", { d: `M${x1},${y1 + h / 2} C${x1},${y1 + dy / 2 + 8} ${x2},${y2 - dy / 2 - 8} ${x2},${y2 - h / 2}` }));
    }
    for (const drawnNode of drawing.nodes) {
      const node = nodeAt(stage, drawnNode[0]), [x, y] = place(drawnNode);
      const full = label(node), label_ = svg("text", { x, y });
      label_.textContent = full.length > 15 ? `…${full.slice(-14)}` : full;
      const title = svg("title", {});
      title.textContent = node[LINE];
      const group = svg("g", { class: `node${drawnNode[3] ? " part" : ""}` }, svg("rect", { x: x - w / 2, y: y - h / 2, width: w, height: h }), label_, title);
      group.addEventListener("click", () => { const at = atValue.get(node[VALUE]); if (at !== undefined) choose(at); });
      picture.append(group);
    }
    return picture;
  }

  function label(node) {
    if (node[OP] === "output") return "return";
    const parts = /^([^:=]+?)(?:: .*?)? = ([^(\s]+)/.exec(node[LINE]);
    if (!parts) return node[LINE];
    return node[OP] === "call" ? parts[2] : parts[1];
  }

  // ------------------------------------------------------------------ the frame

  const bytes = (n) => (n < 1e3 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(2)} GB`);

  function overview() {
    const stage = (name) => graph.stages.find((s) => s.name === name);
    const done = graph.sites.filter((s) => s.records.some((r) => r[2] && r[0] !== "recognise")).length;
    const facts = [["norms", `${graph.sites.length}`], ["rewritten", `${done}`]];
    const [before, after] = ["recognise", "hoist"].map((name) => stage(name) && stage(name).cost);
    if (before && after) {
      const saved = (k, show) => (before[k] === after[k] ? `${show(before[k])}, none saved` : `${show(before[k])} → ${show(after[k])}`);
      facts.push(["bytes a call, by the cost model", saved(0, bytes)], ["launches", saved(1, String)]);
    }
    if (graph.hoisted[0]) facts.push(["computed once", `${graph.hoisted[0]} tensors, ${bytes(graph.hoisted[1])}`]);
    facts.push(["compile", `${(1e3 * graph.stages.reduce((sum, s) => sum + s.seconds, 0)).toFixed(0)} ms`]);
    if (graph.fallback) facts.push(["left to Inductor", graph.fallback]);
    $("overview").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
  }

  function chooseStage(i) {
    state.stage = Math.max(0, Math.min(graph.stages.length - 1, i));
    $("slider").value = state.stage;
    [...$("stages").children].forEach((tab, k) => tab.setAttribute("aria-selected", k === state.stage));
    load();
    const head = (stage) => [make("b", { text: graph.stages[stage].name }), `  ${graph.stages[stage].nodes.length} nodes, ${(1e3 * graph.stages[stage].seconds).toFixed(1)} ms`];
    if (graph.stages.length) { $("lefthead").replaceChildren(...head(earlier())); $("righthead").replaceChildren(...head(state.stage)); }
    const at = atValue.get(state.value);
    if (at !== undefined) { reveal(at); details(rows[at]); } else details(null);
  }

  function chooseGraph(i) {
    state.graph = i;
    graph = data.graphs[i];
    Object.assign(state, { value: -1, site: -1, hit: -1 });
    $("slider").max = Math.max(graph.stages.length - 1, 0);
    $("stages").replaceChildren(...graph.stages.map((stage, k) => make("button", { type: "button", role: "tab", text: stage.name, onclick: () => chooseStage(k) })));
    overview();
    listSites();
    $("view").scrollTop = 0;
    chooseStage(graph.stages.length - 1);
    if (changed.length) reveal(changed[0]);
  }

  function dark(on) {
    document.documentElement.classList.toggle("dark", on);
    document.documentElement.style.colorScheme = on ? "dark" : "light";
  }

  const KEYS = [
    ["n, p", "next change, change before"], ["↓ ↑ or j k", "line by line"], ["← →", "stage before, next stage"], ["/", "search; Enter and Shift+Enter go on"],
    ["c", "all lines, or changes alone"], ["g", "next graph"], ["t", "light or dark"], ["Esc", "leave the search"], ["?", "this list"],
  ];

  function move(by) {
    const at = atValue.get(state.value);
    const here = at === undefined ? -1 : shown.indexOf(at);
    for (let i = here + by; i >= 0 && i < shown.length; i += by) if (shown[i] >= 0) return choose(shown[i]);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    if (event.target === $("search")) {
      if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1);
      else if (event.key === "Escape") { $("search").value = ""; find(""); $("text").focus(); }
      else return;
      event.preventDefault();
      return;
    }
    if (["SELECT", "INPUT"].includes(event.target.tagName)) return;
    const actions = {
      n: () => step(1), p: () => step(-1), j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1),
      ArrowLeft: () => chooseStage(state.stage - 1), ArrowRight: () => chooseStage(state.stage + 1), "/": () => $("search").focus(),
      t: () => $("theme").click(), "?": () => $("keys").showModal(),
      c: () => { $("filter").value = $("filter").value === "all" ? "changes" : "all"; select(); },
      g: () => { const next = (state.graph + 1) % data.graphs.length; $("graph").value = next; chooseGraph(next); },
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  function find(query) {
    state.query = query;
    state.hit = -1;
    if (!query && $("filter").value === "matches") $("filter").value = "all";
    select();
  }

  function splitters() {
    for (const splitter of document.querySelectorAll(".splitter")) {
      splitter.addEventListener("pointerdown", (down) => {
        const pane = $(splitter.dataset.pane), width = pane.offsetWidth, sign = splitter.dataset.pane === "sites" ? 1 : -1;
        splitter.setPointerCapture(down.pointerId);
        splitter.classList.add("held");
        const drag = (e) => document.documentElement.style.setProperty(`--${splitter.dataset.pane}`, `${Math.max(120, Math.min(700, width + sign * (e.clientX - down.clientX)))}px`);
        splitter.addEventListener("pointermove", drag);
        splitter.addEventListener("pointerup", () => { splitter.removeEventListener("pointermove", drag); splitter.classList.remove("held"); draw(); }, { once: true });
      });
    }
  }

  const prefers = matchMedia("(prefers-color-scheme: dark)");
  dark(prefers.matches);
  prefers.addEventListener("change", (e) => dark(e.matches));
  $("theme").addEventListener("click", () => dark(!document.documentElement.classList.contains("dark")));
  $("graph").append(...data.graphs.map((g, i) => make("option", { value: i, text: g.training ? `${g.name} (training)` : g.name })));
  $("graph").addEventListener("change", (e) => chooseGraph(Number(e.target.value)));
  $("slider").addEventListener("input", (e) => chooseStage(Number(e.target.value)));
  $("beside").addEventListener("change", () => chooseStage(state.stage));
  $("filter").addEventListener("change", select);
  $("search").addEventListener("input", (e) => find(e.target.value));
  $("sitefilter").addEventListener("input", listSites);
  $("up").addEventListener("click", () => step(-1));
  $("down").addEventListener("click", () => step(1));
  $("help").addEventListener("click", () => $("keys").showModal());
  document.querySelector("#keys table").append(...KEYS.map(([key, what]) => make("tr", {}, make("td", { text: key }), make("td", { text: what }))));
  $("view").addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  addEventListener("keydown", onKey);
  splitters();
  if (data.graphs.length) chooseGraph(0);
  else details(null);
  document.documentElement.dataset.ready = "yes";
})();
