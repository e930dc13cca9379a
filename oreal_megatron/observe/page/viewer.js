/* ---- viewer of rollouts ---- */
const listing = JSON.parse(document.getElementById("listing").textContent);
const nonce = document.currentScript.nonce;
const loaded = new Map();
const waiting = new Map();
const SHOWN = 300;
const state = { run: 0, step: 0, rollout: null, compare: false, colouring: "weight", mathematics: true, formulas: [], limit: SHOWN };

function oreal_step(run, step, prompts, formulas) {
  const rows = prompts.flatMap((prompt) => prompt.rollouts.map((rollout) => ({ prompt, ...rollout })));
  for (const row of rows) {
    row.text = `${row.response}\n${row.prompt.question}\n${row.extracted ?? ""}\n${row.prompt.gold}`.toLowerCase();
  }
  loaded.clear(); /* one step in memory at a time */
  state.formulas = formulas;
  loaded.set(`${run} ${step}`, rows);
  waiting.get(`${run} ${step}`)?.(rows);
}
window.oreal_step = oreal_step;

function load_step(run, entry) {
  const key = `${run} ${entry.step}`;
  if (loaded.has(key)) return Promise.resolve(loaded.get(key));
  return new Promise((resolve, reject) => {
    waiting.set(key, resolve);
    const script = make("script", { src: entry.file });
    script.nonce = nonce;
    script.onload = () => script.remove();
    script.onerror = () => reject(new Error(`${entry.file} is missing: copy the folder of the rollouts with the page`));
    document.head.append(script);
  });
}

function side_of(row) {
  const ended = row.finished ? "" : ", truncated";
  const chosen = row.chosen ? `, trained on, advantage ${show_number(row.chosen.advantage)}` : "";
  const head = make("p", { class: "trail" }, make("span", { class: `outcome ${row.verdict}` }, row.verdict), ` rollout ${row.index}, ${row.tokens} tokens${ended}${chosen}`);
  const { extracted } = row;
  const answer = extracted === null || extracted === undefined ? ["no answer found"] : ["answer ", ...typeset(String(extracted), row.formulas?.extracted)];
  const gold = ["; gold ", ...typeset(String(row.prompt.gold), row.prompt.formulas?.gold)];
  const reason = row.reason ? `; ${row.reason}` : "";
  const trail = make("p", { class: "trail" }, ...answer, ...gold, `; decided by: ${row.method}${reason}`);
  return make("div", {}, head, trail, response_of(row), make("p", { class: "note" }, colour_note(row)));
}

function sides(row) {
  if (!state.compare) return [row];
  const own = visible.rows.filter((other) => other.prompt === row.prompt);
  const order = (a, b) => Number(Boolean(b.chosen)) - Number(Boolean(a.chosen));
  const opposite = { correct: "incorrect", incorrect: "correct" }[row.verdict];
  const other = own.filter((candidate) => candidate.verdict === opposite).sort(order)[0];
  if (!other) return [row];
  return row.verdict === "correct" ? [row, other] : [other, row];
}

function history_of(prompt) {
  if (!prompt.history.length) return "";
  const present = listing[state.run].steps[state.step].step;
  const chips = prompt.history.map(([step, slot, correct, known]) => {
    const current = String(step === present && slot === prompt.slot);
    return make("button", { "aria-current": current, onclick: () => open_prompt(step, slot) }, `step ${step}: ${correct} of ${known}`);
  });
  return make("div", { class: "chips", role: "group", "aria-label": "this prompt over the steps" }, "this prompt over the steps, correct rollouts: ", ...chips);
}

async function open_prompt(step, slot) {
  state.step = listing[state.run].steps.findIndex((entry) => entry.step === step);
  controls.slider.value = state.step;
  await show_step();
  const own = (row) => row.prompt.slot === slot;
  const row = visible.matching.find(own) ?? visible.rows.find(own);
  if (row) show_rollout(row);
}

function show_rollout(row) {
  state.rollout = row;
  if (!row) return detail.replaceChildren(make("p", { class: "empty" }, "no rollout matches"));
  const own = visible.rows.filter((other) => other.prompt === row.prompt);
  const chips = own.map((other) =>
    make("button", { class: other.verdict, "aria-current": String(other === row), onclick: () => show_rollout(other) }, `${other.index}${other.chosen ? " *" : ""}`),
  );
  const rated = own.filter((other) => other.verdict === "correct").length;
  detail.replaceChildren(
    make("h3", {}, `Prompt ${row.prompt.slot}: ${rated} of ${own.length} correct`),
    make("div", { class: "question" }, ...typeset(row.prompt.question, row.prompt.formulas?.question)),
    make("div", { class: "chips", role: "group", "aria-label": "rollouts of the prompt; * trained on" }, ...chips),
    make("div", { class: "sides" }, ...sides(row).map(side_of)),
    history_of(row.prompt),
  );
  for (const button of list.querySelectorAll("button")) button.setAttribute("aria-current", String(button.row === row));
}

const visible = { rows: [], matching: [] };
const list = make("div", { class: "list", tabindex: "-1" });
const detail = make("div", { class: "detail" });
const status = make("p", { class: "note", role: "status" });
const controls = {};

function matches(row) {
  const { outcome, method, shortest, longest, truncated, chosen, search } = controls;
  if (outcome.value && row.verdict !== outcome.value) return false;
  if (method.value && row.method !== method.value) return false;
  if (shortest.value && row.tokens < Number(shortest.value)) return false;
  if (longest.value && row.tokens > Number(longest.value)) return false;
  if (truncated.checked && row.finished) return false;
  if (chosen.checked && !row.chosen) return false;
  return !search.value || row.text.includes(search.value.toLowerCase());
}

function list_rollouts() {
  visible.matching = visible.rows.filter(matches);
  const buttons = visible.matching.slice(0, state.limit).map((row) => {
    const label = `${row.prompt.slot}.${row.index}`;
    const button = make(
      "button",
      { onclick: () => show_rollout(row) },
      make("span", { class: `outcome ${row.verdict}` }, row.verdict),
      ` ${label}, ${row.tokens} tokens${row.finished ? "" : ", truncated"}${row.chosen ? " *" : ""}`,
      make("span", { class: "preview" }, row.response.slice(0, 120)),
    );
    button.row = row;
    return button;
  });
  if (visible.matching.length > state.limit) {
    buttons.push(make("button", { onclick: () => { state.limit += SHOWN; list_rollouts(); } }, `show more of ${visible.matching.length}`));
  }
  list.replaceChildren(...buttons);
  status.textContent = `${visible.matching.length} of ${visible.rows.length} rollouts; * trained on`;
  show_rollout(visible.matching.includes(state.rollout) ? state.rollout : visible.matching[0]);
}

async function show_step() {
  const run = listing[state.run];
  const entry = run.steps[state.step];
  controls.number.textContent = `step ${entry.step} (${state.step + 1} of ${run.steps.length}, ${(entry.bytes / 1e6).toFixed(1)} MB)`;
  try {
    const rows = await load_step(state.run, entry);
    if (entry !== listing[state.run].steps[state.step]) return;
    visible.rows = rows;
  } catch (error) {
    status.textContent = error.message;
    return;
  }
  const methods = [...new Set(visible.rows.map((row) => row.method))].sort();
  fill(controls.method, [["", "any"], ...methods.map((name) => [name, name])]);
  state.limit = SHOWN;
  state.rollout = null;
  list_rollouts();
}

function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
  if (options.some(([value]) => value === before)) select.value = before;
}

function go(steps) {
  const last = listing[state.run].steps.length - 1;
  state.step = Math.min(Math.max(state.step + steps, 0), last);
  controls.slider.value = state.step;
  show_step();
}

function field(name, input) {
  controls[name] = input;
  return input;
}

function labelled(text, input, kind = "") {
  return make("label", { class: kind }, ...(kind ? [input, text] : [text, input]));
}

function select_of(name, options, onchange) {
  const select = field(name, make("select", { onchange }));
  fill(select, options);
  return select;
}

function build_viewer(viewer) {
  const runs = listing.map((run, number) => [String(number), run.name]).filter(([number]) => listing[number].steps.length);
  state.run = Number(runs[0][0]);
  const change_run = () => {
    state.run = Number(controls.run.value);
    state.step = listing[state.run].steps.length - 1;
    controls.slider.max = state.step;
    controls.slider.value = state.step;
    show_step();
  };
  const refilter = () => { state.limit = SHOWN; list_rollouts(); };
  const redraw = () => { state.colouring = controls.colouring.value; state.compare = controls.compare.checked; state.mathematics = controls.mathematics.checked; show_rollout(state.rollout); };
  const box = (name, onchange) => field(name, make("input", { type: "checkbox", onchange }));
  const input = (name, type) => field(name, make("input", { type, oninput: refilter, ...(type === "number" ? { min: "0" } : {}) }));
  controls.number = make("span", {});
  viewer.append(
    make("div", { class: "controls" },
      labelled("run", select_of("run", runs, change_run)),
      make("button", { onclick: () => go(-1), "aria-label": "previous step" }, "<"),
      labelled("step", field("slider", make("input", { type: "range", min: "0", onchange: () => { state.step = Number(controls.slider.value); show_step(); } }))),
      make("button", { onclick: () => go(1), "aria-label": "next step" }, ">"),
      controls.number,
    ),
    make("div", { class: "controls" },
      labelled("search", input("search", "search")),
      labelled("outcome", select_of("outcome", [["", "any"], ["correct", "correct"], ["incorrect", "incorrect"], ["unknown", "unknown"]], refilter)),
      labelled("method", select_of("method", [["", "any"]], refilter)),
      labelled("tokens from", input("shortest", "number")),
      labelled("to", input("longest", "number")),
      labelled("truncated", box("truncated", refilter), "check"),
      labelled("trained on", box("chosen", refilter), "check"),
      labelled("colour tokens by", select_of("colouring", Object.entries(COLOURINGS), redraw)),
      labelled("mathematics", box("mathematics", redraw), "check"),
      labelled("correct and incorrect side by side", box("compare", redraw), "check"),
    ),
    status,
    make("div", { class: "columns" }, list, detail),
  );
  controls.colouring.value = state.colouring;
  controls.mathematics.checked = state.mathematics;
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const target = move && document.activeElement[move];
    if (!target) return;
    event.preventDefault();
    target.focus();
    if (target.row) show_rollout(target.row);
  });
  change_run();
}

const viewer = document.getElementById("viewer");
if (viewer) build_viewer(viewer);
