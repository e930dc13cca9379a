/* ---- texts of a rollout: formulas, tokens in colours, marks of the search ---- */
const MATHML = "http://www.w3.org/1998/Math/MathML";
const COLOURINGS = {
  none: "no colours",
  weight: "token weight",
  score: "reward model's score",
  logp: "log-prob (engine)",
  reference: "log-prob (reference)",
  difference: "log-prob: engine - reference",
};

function draw_tree([name, ...parts]) {
  const node = document.createElementNS(MATHML, name);
  for (const part of parts) {
    if (typeof part === "string") node.append(part);
    else if (Array.isArray(part)) node.append(draw_tree(part));
    else for (const [attribute, value] of Object.entries(part)) node.setAttribute(attribute, value);
  }
  return node;
}

/* Parts of a text with its formulas drawn; `numbers`: of the formulas, in the order of the text. */
function typeset(text, numbers = []) {
  if (!state.mathematics) return marked(text);
  const [parts, word] = [[], controls.search.value.toLowerCase()];
  let start = 0;
  for (const number of numbers) {
    const [source, tree] = state.formulas[number];
    const place = text.indexOf(source, start);
    if (place < 0) continue;
    const tag = word && source.toLowerCase().includes(word) ? "mark" : "span";
    parts.push(...marked(text.slice(start, place)), make(tag, { class: "formula", title: source }, draw_tree(tree)));
    start = place + source.length;
  }
  return [...parts, ...marked(text.slice(start))];
}

function colour_of(kind, value, scale) {
  if (value === null || value === undefined) return "";
  const strength = 0.8 * Math.min(Math.abs(value) / scale, 1);
  if (kind === "weight") return `rgba(230, 120, 0, ${strength})`;
  if (kind === "logp" || kind === "reference") return `rgba(120, 70, 200, ${strength})`;
  return value > 0 ? `rgba(0, 130, 200, ${strength})` : `rgba(215, 70, 40, ${strength})`;
}

function token_values(chosen, kind) {
  if (kind !== "difference") return chosen[kind];
  if (!chosen.logp || !chosen.reference) return undefined;
  return chosen.logp.map((value, place) => (value === null || chosen.reference[place] === null ? null : value - chosen.reference[place]));
}

function response_of(row) {
  const box = make("div", { class: "response", tabindex: "0", role: "group", "aria-label": "response" });
  const values = row.chosen && state.colouring !== "none" ? token_values(row.chosen, state.colouring) : undefined;
  if (!values) {
    box.append(...typeset(row.response, row.formulas?.response));
    return box;
  }
  const scale = Math.max(...values.map((value) => Math.abs(value ?? 0)), 1e-6);
  row.chosen.tokens.forEach((token, place) => {
    const value = values[place];
    const title = `${COLOURINGS[state.colouring]}: ${value === null ? "none" : show_number(value)}`;
    const part = make("span", { title }, token);
    part.style.backgroundColor = colour_of(state.colouring, value, scale);
    box.append(part);
  });
  return box;
}

function colour_note(row) {
  if (!row.chosen) return "";
  if (state.colouring === "none") return "";
  const values = token_values(row.chosen, state.colouring);
  if (!values) return `${COLOURINGS[state.colouring]}: not recorded`;
  const numbers = values.filter((value) => value !== null);
  const range = `${show_number(Math.min(...numbers))} to ${show_number(Math.max(...numbers))}`;
  const signs = ["score", "difference"].includes(state.colouring) ? "; blue above 0, red below" : "";
  return `${COLOURINGS[state.colouring]}: ${range}; the largest has the full colour${signs}`;
}

function marked(text) {
  const word = controls.search.value.toLowerCase();
  if (!word) return [text];
  const [parts, lower] = [[], text.toLowerCase()];
  let start = 0;
  for (let place = lower.indexOf(word); place >= 0 && parts.length < 2000; place = lower.indexOf(word, start)) {
    parts.push(text.slice(start, place), make("mark", {}, text.slice(place, place + word.length)));
    start = place + word.length;
  }
  return [...parts, text.slice(start)];
}
