// The browser of played games. Reads the JSON beside it; every text goes into the page as text, never as HTML.
"use strict";
(() => {
  const section = document.getElementById("games");
  const source = document.getElementById("episodes");
  if (!section || !source) return;
  const data = JSON.parse(source.textContent);
  const texts = data.texts;
  const lower = texts.map((t) => t.toLowerCase());
  const at = (id) => document.getElementById(id);
  const [setBox, leftBox, rightBox, kindBox, roomBox, outcomeBox, queryBox, list, panes, count] =
    ["f-set", "f-left", "f-right", "f-kind", "f-room", "f-outcome", "f-text", "g-list", "g-panes", "g-count"].map(at);
  const WIDTH = 6; // numbers a step
  const MOST = 400; // list entries drawn at once
  const words = (name) => name.replaceAll("_", " ");
  let query = "";

  for (const set of data.sets) {
    set.played = set.tasks.map(() => []);
    for (const e of set.episodes) set.played[e.t][e.s] = e;
    set.order = set.tasks.map((_, i) => i).sort((a, b) => {
      const [x, y] = [set.tasks[a], set.tasks[b]];
      return x.kind.localeCompare(y.kind) || x.goal.localeCompare(y.goal) || x.id.localeCompare(y.id);
    });
  }
  const usable = data.sets.filter((s) => s.tasks.length);
  const state = { set: usable[0], task: -1 };
  const example = document.querySelector("#games ~ * .examples button[data-left]");

  // --- building blocks -----------------------------------------------------------------------------------------------
  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) put(node, text);
    return node;
  }

  // Appends `text` to `node`, with what was searched for marked.
  function put(node, text) {
    const hay = text.toLowerCase();
    let from = 0;
    // Lower-casing may change a text's length (İ): marks would then be misplaced, so there are none.
    for (let hit = query && hay.length === text.length ? hay.indexOf(query) : -1; hit >= 0; hit = hay.indexOf(query, from)) {
      node.append(text.slice(from, hit));
      const mark = document.createElement("mark");
      mark.textContent = text.slice(hit, hit + query.length);
      node.append(mark);
      from = hit + query.length;
    }
    node.append(text.slice(from));
    return node;
  }

  function fill(box, entries, wanted) {
    const keep = wanted === undefined ? box.value : wanted;
    box.replaceChildren(...entries.map(([value, label]) => {
      const option = element("option");
      option.value = value;
      option.textContent = label;
      return option;
    }));
    box.value = entries.some(([value]) => value === keep) ? keep : entries[0][0];
  }

  // --- filters -------------------------------------------------------------------------------------------------------
  function fillSet(left, right) {
    const set = state.set;
    const names = set.sources.map((name, i) => [String(i), name]);
    const place = (name, other) => String(Math.max(0, set.sources.includes(name) ? set.sources.indexOf(name) : other));
    fill(leftBox, names, left === undefined ? place("base", 0) : String(left));
    const free = names.length > 1 && leftBox.value === String(names.length - 1) ? 0 : names.length - 1;
    fill(rightBox, names, right === undefined ? place("distilled", free) : String(right));
    const unique = (key) => [...new Set(set.tasks.map((t) => t[key]))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    fill(kindBox, [["", "all"], ...unique("kind").map((k) => [k, words(k)])]);
    fill(roomBox, [["", "all"], ...unique("room").map((r) => [r, r])]);
    const stops = [...new Set(set.episodes.map((e) => e.stop))].sort();
    fill(outcomeBox, [
      ["", "any"], ["left", "left won"], ["!left", "left lost"], ["left!right", "left won, right lost"],
      ["!left right", "left lost, right won"], ["both", "both won"], ["none", "both lost"],
      ...stops.map((s) => [`stop:${s}`, `left ended by: ${words(s)}`]),
    ]);
    const left_out = set.of - set.shown;
    at("g-sample").textContent = left_out
      ? `A sample: ${set.shown} of ${set.of} ${set.name} are stored in this page, mixed over task types and chosen without looking at outcomes.`
      : `All ${set.of} ${set.name} are stored in this page.`;
  }

  function pair(task) {
    const played = state.set.played[task];
    return [played[leftBox.value], played[rightBox.value]];
  }

  const OUTCOMES = {
    "": () => true,
    left: (a) => a && a.won,
    "!left": (a) => a && !a.won,
    "left!right": (a, b) => a && b && a.won && !b.won,
    "!left right": (a, b) => a && b && !a.won && b.won,
    both: (a, b) => a && b && a.won && b.won,
    none: (a, b) => a && b && !a.won && !b.won,
  };

  function found() {
    const outcome = outcomeBox.value;
    const hits = query ? new Set(lower.flatMap((t, i) => (t.includes(query) ? [i] : []))) : null;
    const holds = (e) => e && (hits.has(e.start) || e.hints.some((h) => hits.has(h)) || e.steps.some((n, i) => i % WIDTH < 4 && hits.has(n)));
    return state.set.order.filter((i) => {
      const task = state.set.tasks[i];
      const [a, b] = pair(i);
      if (!a && !b) return false;
      if (kindBox.value && task.kind !== kindBox.value) return false;
      if (roomBox.value && task.room !== roomBox.value) return false;
      if (outcome.startsWith("stop:") ? !a || a.stop !== outcome.slice(5) : !OUTCOMES[outcome](a, b)) return false;
      if (!hits) return true;
      return `${task.goal}\n${task.id}`.toLowerCase().includes(query) || holds(a) || holds(b);
    });
  }

  // --- list ----------------------------------------------------------------------------------------------------------
  function outcomeMark(name, e) {
    const node = element("span", e ? (e.won ? "won" : "lost") : "soft");
    node.textContent = e ? (e.won ? "✓" : "✗") : "–";
    node.title = e ? `${name}: ${e.won ? "won" : "lost"}` : `${name}: not played`;
    return node;
  }

  function item(task) {
    const button = element("button");
    button.type = "button";
    button.dataset.task = task;
    button.tabIndex = -1;
    const marks = element("span", "marks");
    const [a, b] = pair(task);
    marks.append(outcomeMark("left", a), outcomeMark("right", b));
    const label = element("span", "goal", state.set.tasks[task].goal || state.set.tasks[task].id);
    label.append(element("small", "", `${words(state.set.tasks[task].kind)} · ${state.set.tasks[task].room}`));
    button.append(marks, label);
    button.setAttribute("aria-label", `${state.set.tasks[task].goal}: left ${a ? (a.won ? "won" : "lost") : "not played"}, right ${b ? (b.won ? "won" : "lost") : "not played"}`);
    const entry = element("li");
    entry.append(button);
    return entry;
  }

  function choose(task, focus) {
    state.task = task;
    for (const button of list.querySelectorAll("button")) {
      const here = Number(button.dataset.task) === task;
      button.tabIndex = here ? 0 : -1;
      if (here) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      if (!here) continue;
      if (focus) button.focus();
      const [top, bottom] = [button.offsetTop, button.offsetTop + button.offsetHeight];
      if (top < list.scrollTop) list.scrollTop = top;
      else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
    }
    drawPanes();
  }

  function draw() {
    query = queryBox.value.trim().toLowerCase();
    const tasks = found();
    const chosen = Math.max(0, tasks.indexOf(state.task));
    // The chosen game is always among those drawn: without it no button could be reached by Tab.
    const from = chosen < MOST ? 0 : Math.min(chosen - MOST / 2, tasks.length - MOST);
    list.replaceChildren(...tasks.slice(from, from + MOST).map(item));
    const wins = (i) => tasks.filter((t) => pair(t)[i] && pair(t)[i].won).length;
    const part = from ? `Games ${from + 1} to ${from + MOST}` : `The first ${MOST}`;
    const more = tasks.length > MOST ? ` ${part} are listed; narrow the filters.` : "";
    count.textContent = `${tasks.length} of ${state.set.shown} games; left won ${wins(0)}, right won ${wins(1)}.${more}`;
    if (tasks.length) choose(tasks[chosen], false);
    else {
      state.task = -1;
      panes.replaceChildren(element("p", "soft", "No game fits these filters."));
    }
  }

  // --- two policies on one game --------------------------------------------------------------------------------------
  function fork(a, b) {
    if (!a || !b || a === b) return -1;
    for (let i = 0; i < Math.max(a.n, b.n); i++) {
      if (i >= a.n || i >= b.n || a.steps[i * WIDTH + 1] !== b.steps[i * WIDTH + 1]) return i;
    }
    return -1;
  }

  function step(e, i, parting) {
    const [thought, action, seen, reply, valid] = e.steps.slice(i * WIDTH, (i + 1) * WIDTH);
    const node = element("li", valid ? "" : "refused");
    if (i === parting) node.append(element("div", "fork", "First action that differs"));
    if (texts[thought]) node.append(element("div", "thought", texts[thought]));
    node.append(element("div", "action", texts[action] || "(no action)"));
    if (reply >= 0) node.append(element("div", "reply", texts[reply]));
    if (!valid) node.append(element("span", "tag", "refused"));
    node.append(element("div", "seen", texts[seen]));
    return node;
  }

  function pane(side, name, e, parting) {
    const node = element("article", "play");
    node.append(element("h4", "", `${side}: ${name}`));
    if (!e) {
      node.append(element("p", "soft", "Did not play this game."));
      return node;
    }
    node.dataset.episode = e.id;
    const last = e.steps.at(-1); // the last step's reward is the game's
    const reward = last > 0 && last < 1000 ? ` (reward ${last / 1000})` : "";
    node.append(element("span", `verdict ${e.won ? "won" : "lost"}`, `${e.won ? "✓ won" : "✗ lost"}${reward}`));
    const number = (n) => n.toLocaleString("en-US");
    node.append(element("span", "soft", ` in ${e.n} steps, ended by ${words(e.stop)}; ${e.bad} refused; ${number(e.billed)} tokens billed, ${number(e.computed)} computed; ${e.sec} s`));
    if (e.error >= 0) node.append(element("p", "tag", texts[e.error]));
    for (const hint of e.hints) node.append(element("p", "hint", `Hint: ${texts[hint]}`));
    const start = element("details");
    start.append(element("summary", "soft", "First observation"), element("div", "seen", texts[e.start]));
    if (query && lower[e.start].includes(query)) start.open = true;
    if (texts[e.start]) node.append(start);
    const steps = element("ol");
    steps.tabIndex = 0;
    steps.setAttribute("aria-label", `Steps, ${side}, ${name}`);
    for (let i = 0; i < e.n; i++) steps.append(step(e, i, parting));
    node.append(steps);
    node.append(element("p", "soft id", `episode ${e.id}`));
    return node;
  }

  function drawPanes() {
    const [a, b] = pair(state.task);
    const task = state.set.tasks[state.task];
    const head = element("p", "task", task.goal);
    head.append(element("small", "", `${words(task.kind)} · ${task.room} · ${task.id}`));
    const name = (box) => state.set.sources[box.value];
    const duel = element("div", "duel");
    const parting = fork(a, b);
    duel.append(pane("Left", name(leftBox), a, parting), pane("Right", name(rightBox), b, parting));
    panes.replaceChildren(head, duel);
  }

  // --- links from elsewhere in the page ------------------------------------------------------------------------------
  function find(id) {
    for (const set of usable) {
      const e = set.episodes.find((x) => x.id === id);
      if (e) return [set, e];
    }
    return [null, null];
  }

  function show(left, right) {
    const [set, a] = find(left);
    if (!set) return;
    const [, b] = right ? find(right) : [null, null];
    state.set = set;
    state.task = a.t;
    setBox.value = String(usable.indexOf(set));
    // Beside a training attempt stands the hinted one; both selects then offer the same sources.
    const beside = set.played[a.t].findIndex((x, i) => x && i !== a.s && x.hints.length > 0);
    fillSet(a.s, b ? b.s : beside >= 0 ? beside : undefined);
    for (const box of [kindBox, roomBox, outcomeBox, queryBox]) box.value = "";
    draw();
    section.scrollIntoView();
    list.querySelector("[aria-current]").focus({ preventScroll: true });
  }

  function follow() {
    const id = new URLSearchParams(location.hash.slice(1)).get("episode");
    if (id) show(id);
  }

  fill(setBox, usable.map((s, i) => [String(i), s.name]), "0");
  fillSet();
  setBox.addEventListener("change", () => {
    state.set = usable[Number(setBox.value)];
    state.task = -1;
    fillSet();
    draw();
  });
  for (const box of [leftBox, rightBox, kindBox, roomBox, outcomeBox]) box.addEventListener("change", draw);
  let timer = 0;
  queryBox.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(draw, 120);
  });
  at("g-form").addEventListener("submit", (event) => event.preventDefault());
  at("f-swap").addEventListener("click", () => {
    [leftBox.value, rightBox.value] = [rightBox.value, leftBox.value];
    draw();
  });
  at("f-reset").addEventListener("click", () => {
    for (const box of [kindBox, roomBox, outcomeBox, queryBox]) box.value = "";
    draw();
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(Number(button.dataset.task), false);
  });
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")];
    const here = buttons.findIndex((b) => Number(b.dataset.task) === state.task);
    const moves = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1, PageDown: here + 8, PageUp: here - 8 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = Math.min(Math.max(moves[event.key], 0), buttons.length - 1);
    choose(Number(buttons[next].dataset.task), true);
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-left]");
    if (button) show(button.dataset.left, button.dataset.right);
  });
  addEventListener("hashchange", follow);
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const d of closed) d.open = true;
  });
  addEventListener("afterprint", () => {
    for (const d of closed) d.open = false;
  });
  at("g-body").hidden = false;
  const [, opening] = example ? find(example.dataset.left) : [];
  if (opening) state.task = opening.t;
  draw();
  follow();
})();
