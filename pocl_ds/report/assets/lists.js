"use strict";
// Lists to search and filter: thousands of records stay data, and one page of them is in the document at a time.

const ROWS = 12;

function option(menu, value, text) {
  const one = make("option", menu, text);
  one.value = value;
}

// A text from data: its own direction, and what was searched for is marked.
function quote(parent, text, query, css) {
  const node = make("pre", parent, undefined, css);
  node.dir = "auto";
  if (text === null || !text.trim()) {
    make("i", node, text === null ? "(none)" : "(empty)");
    return node;
  }
  mark(node, text, query);
  return node;
}

function mark(node, text, query) {
  const lower = text.toLowerCase();
  let from = 0;
  // A lower-case form of another length would put marks in wrong places.
  for (let at; query && lower.length === text.length && (at = lower.indexOf(query, from)) >= 0; from = at + query.length) {
    node.append(text.slice(from, at));
    make("mark", node, text.slice(at, at + query.length));
  }
  node.append(text.slice(from));
}

function column(parent, title, score, text, query, css) {
  const box = make("div", parent, undefined, "answer" + (css ? " " + css : ""));
  const head = make("h4", box, title);
  if (score !== null) make("span", head, score.toFixed(1), "score");
  for (const one of Array.isArray(text) ? text : [text]) quote(box, one, query);
}

class List {
  constructor(root, source) {
    this.root = root;
    this.source = source;
    this.page = 0;
    this.input = root.querySelector("input");
    this.menus = Object.fromEntries([...root.querySelectorAll("select")].map((menu) => [menu.dataset.field, menu]));
    source.fill(this.menus);
    let waiting;
    this.input.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.find(), 80);
    });
    for (const menu of Object.values(this.menus)) menu.addEventListener("change", () => this.find());
    this.find();
  }

  find() {
    this.query = this.input.value.trim().toLowerCase();
    const chosen = Object.fromEntries(Object.entries(this.menus).map(([field, menu]) => [field, menu.value]));
    this.found = this.source.find(chosen, this.query);
    this.page = 0;
    this.show();
  }

  show(open = -1) {
    const rows = this.root.querySelector(".rows"), first = this.page * ROWS, total = this.source.total();
    const shown = this.found.slice(first, first + ROWS);
    rows.replaceChildren(...shown.map((i) => this.source.row(i, this.query)));
    if (open >= 0) rows.children[open].open = true;
    this.root.querySelector(".count").textContent =
      `${this.found.length.toLocaleString("en")} of ${total.toLocaleString("en")}` +
      (shown.length ? `, ${first + 1} to ${first + shown.length} are shown` : ": nothing fits, change the search or the menus");
    this.turn();
  }

  turn() {
    const last = Math.max(0, Math.ceil(this.found.length / ROWS) - 1), pager = this.root.querySelector(".pager");
    const to = (page, keep) => () => {
      this.page = page;
      this.show();
      pager.children[keep].focus();
    };
    pager.replaceChildren();
    if (!last) return;
    const steps = [["first", 0], ["back", this.page - 1], ["on", this.page + 1], ["last", last]];
    steps.forEach(([name, page], i) => {
      const button = make("button", pager, name);
      button.type = "button";
      button.disabled = page < 0 || page > last || page === this.page;
      button.addEventListener("click", to(page, i));
    });
    make("span", pager, `page ${this.page + 1} of ${last + 1}`);
  }
}

class SampleSource {
  constructor(data) {
    this.data = data;
    this.texts = data.ids.map((id, i) => [id, data.prompts[i], data.references[i], data.responses[i] || ""].join("\n").toLowerCase());
    this.subset = data.places.map((place) => data.bounds.findIndex((bound) => bound > place) - 1);
  }

  total() {
    return this.data.ids.length;
  }

  fill({ subset, sort }) {
    option(subset, "", "all");
    for (let i = 0; i + 1 < this.data.bounds.length; i++) option(subset, String(i), `subset ${i + 1}`);
    const orders = [["place", "of the curriculum"], ["rouge", "ROUGE-L, low first"], ["entropy", "cross-entropy, high first"],
      ["seen", "most seen first"]];
    for (const [key, text] of orders) if (key === "place" || this.data[key]) option(sort, key, text);
  }

  find({ subset, sort }, query) {
    const found = [];
    for (let i = 0; i < this.texts.length; i++) {
      if ((subset === "" || this.subset[i] === Number(subset)) && (!query || this.texts[i].includes(query))) found.push(i);
    }
    const values = this.data[sort], sign = sort === "rouge" ? 1 : -1;
    return sort === "place" ? found : found.sort((a, b) => sign * (values[a] - values[b]) || a - b);
  }

  row(i, query) {
    const { data } = this, row = make("details");
    const head = make("summary", row), facts = make("span", head, undefined, "facts");
    const chip = make("span", facts, undefined, "chip");
    if (this.subset[i] >= 0) {
      chip.style.background = `var(--s${this.subset[i]})`;
      make("span", facts, `subset ${this.subset[i] + 1}`);
    }
    make("span", facts, `#${data.places[i] + 1}`);
    if (data.rouge) make("span", facts, `ROUGE-L ${data.rouge[i].toFixed(1)}`);
    if (data.entropy) make("span", facts, `cross-entropy ${data.entropy[i].toFixed(2)}`);
    if (data.seen) make("span", facts, `seen ${data.seen[i]}×`);
    const line = make("bdi", head, undefined, "line");
    mark(line, data.prompts[i].slice(0, 200), query);
    // Built when it is opened: most rows never are.
    row.addEventListener("toggle", () => {
      if (!row.open || row.children.length > 1) return;
      const body = make("div", row, undefined, "answers");
      column(body, "prompt", null, data.prompts[i], query);
      column(body, "reference", null, data.references[i], query);
      column(body, "student before training", data.rouge ? data.rouge[i] : null, data.responses[i], query);
      mark(make("bdi", make("p", row, "id ", "note")), data.ids[i], query);
    });
    return row;
  }
}

const RELATIONS = { above: (a, b) => a > b, below: (a, b) => a < b, even: (a, b) => a === b };

class ItemSource {
  constructor(data) {
    this.data = data;
    this.now = data[0];
    this.texts = data.map((one) => one.ids.map((id, i) =>
      [id, one.questions[i], ...one.references[i], ...one.answers.map((texts) => texts[i])].join("\n").toLowerCase()));
  }

  total() {
    return this.now.ids.length;
  }

  fill({ benchmark, left, relation, right }) {
    this.data.forEach((one, i) => option(benchmark, String(i), one.name));
    option(left, "", "(all items)");
    this.now.models.forEach((name, i) => { option(left, String(i), name); option(right, String(i), name); });
    option(relation, "above", "better");
    option(relation, "below", "worse");
    option(relation, "even", "as good");
    relation.disabled = right.disabled = true;
    left.addEventListener("change", () => { relation.disabled = right.disabled = left.value === ""; });
  }

  find({ benchmark, left, relation, right }, query) {
    this.now = this.data[Number(benchmark)];
    const texts = this.texts[Number(benchmark)], { scores } = this.now, found = [];
    const fits = (i) => left === "" || RELATIONS[relation](scores[Number(left)][i], scores[Number(right)][i]);
    for (let i = 0; i < texts.length; i++) if (fits(i) && (!query || texts[i].includes(query))) found.push(i);
    if (left === "" || relation === "even") return found;
    const gap = (i) => Math.abs(scores[Number(left)][i] - scores[Number(right)][i]);
    return found.sort((a, b) => gap(b) - gap(a) || a - b); // where they differ most comes first
  }

  row(i, query) {
    const { now } = this, row = make("details");
    const head = make("summary", row), facts = make("span", head, undefined, "facts");
    now.models.forEach((name, model) => {
      const one = make("span", facts, `${name} `);
      make("b", one, now.scores[model][i].toFixed(1), "score");
    });
    mark(make("bdi", head, undefined, "line"), now.questions[i].slice(0, 200), query);
    row.addEventListener("toggle", () => {
      if (!row.open || row.children.length > 1) return;
      quote(row, now.questions[i], query, "question");
      const body = make("div", row, undefined, "answers");
      column(body, "reference", null, now.references[i], query, "reference");
      now.models.forEach((name, model) => column(body, name, now.scores[model][i], now.answers[model][i], query,
        name === "student after" ? "m-student" : ""));
      mark(make("bdi", make("p", row, "id ", "note")), now.ids[i], query);
    });
    return row;
  }
}

function browse(name, source) {
  const root = document.querySelector(`[data-browser="${name}"]`);
  return root ? new List(root, source()) : null;
}

const SAMPLES = browse("samples", () => new SampleSource(DATA.samples));
const ITEMS = browse("items", () => new ItemSource(DATA.items));

// A click on a dot of the plane: its sample, or the next one in the order that the page holds.
window.showSample = (place) => {
  if (!SAMPLES) return;
  SAMPLES.input.value = "";
  SAMPLES.menus.subset.value = "";
  SAMPLES.menus.sort.value = "place";
  SAMPLES.find();
  const at = Math.max(0, DATA.samples.places.findIndex((one) => one >= place));
  SAMPLES.page = Math.floor(at / ROWS);
  SAMPLES.show(at % ROWS);
  SAMPLES.root.scrollIntoView({ block: "start" });
};
