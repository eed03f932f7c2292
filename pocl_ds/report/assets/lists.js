"use strict";
// Lists to search and filter. Thousands of records stay data; one page of rows is in the document at a time.

const ROWS_PER_PAGE = 12, SEARCH_DELAY = 80, LINE_LENGTH = 200; // milliseconds, characters

function addOption(menu, value, text) {
  addElement("option", menu, text).value = value;
}

// Adds a text from data, with its own direction and with the search query highlighted.
function addText(parent, text, query, css) {
  const element = addElement("pre", parent, undefined, css);
  element.dir = "auto";
  if (text === null || !text.trim()) {
    addElement("i", element, text === null ? "(none)" : "(empty)");
    return;
  }
  addHighlighted(element, text, query);
}

function addHighlighted(element, text, query) {
  const lower = text.toLowerCase();
  let end = 0;
  // If the lower-case text has another length, its positions do not fit the text.
  if (query && lower.length === text.length) {
    for (let start; (start = lower.indexOf(query, end)) >= 0; end = start + query.length) {
      element.append(text.slice(end, start));
      addElement("mark", element, text.slice(start, start + query.length));
    }
  }
  element.append(text.slice(end));
}

// Adds a column of an opened row: a title, a score, and one or several texts.
function addColumn(parent, title, score, texts, query, css) {
  const column = addElement("div", parent, undefined, "answer" + (css ? " " + css : ""));
  const heading = addElement("h4", column, title);
  if (score !== null) addElement("span", heading, score.toFixed(1), "score");
  for (const text of Array.isArray(texts) ? texts : [texts]) addText(column, text, query);
}

// A row that builds its content when it is opened, since most rows never are.
function createRow(fillSummary, line, query, fillContent, id) {
  const row = addElement("details"), summary = addElement("summary", row);
  fillSummary(addElement("span", summary, undefined, "values"));
  addHighlighted(addElement("bdi", summary, undefined, "line"), line.slice(0, LINE_LENGTH), query);
  row.addEventListener("toggle", () => {
    if (!row.open || row.children.length > 1) return;
    fillContent(row);
    addHighlighted(addElement("bdi", addElement("p", row, "id ", "note")), id, query);
  });
  return row;
}

class FilterList {
  constructor(root, source) {
    this.root = root;
    this.source = source;
    this.page = 0;
    this.input = root.querySelector("input");
    this.menus = Object.fromEntries([...root.querySelectorAll("select")].map((menu) => [menu.dataset.field, menu]));
    source.fillMenus(this.menus);
    let timer;
    this.input.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.filter(), SEARCH_DELAY);
    });
    for (const menu of Object.values(this.menus)) menu.addEventListener("change", () => this.filter());
    this.filter();
  }

  filter() {
    this.query = this.input.value.trim().toLowerCase();
    const values = Object.fromEntries(Object.entries(this.menus).map(([field, menu]) => [field, menu.value]));
    this.matches = this.source.filter(values, this.query);
    this.page = 0;
    this.show();
  }

  // Shows the current page. openRow: index of a row to open.
  show(openRow = -1) {
    const rows = this.root.querySelector(".rows"), start = this.page * ROWS_PER_PAGE;
    const indices = this.matches.slice(start, start + ROWS_PER_PAGE);
    rows.replaceChildren(...indices.map((i) => this.source.row(i, this.query)));
    if (openRow >= 0) rows.children[openRow].open = true;
    const counts = [this.matches.length, this.source.total()].map((count) => count.toLocaleString("en")).join(" of ");
    this.root.querySelector(".count").textContent = counts +
      (indices.length ? `, showing ${start + 1} to ${start + indices.length}` : ": no match, change the search or the menus");
    this.showPager();
  }

  showPager() {
    const lastPage = Math.max(0, Math.ceil(this.matches.length / ROWS_PER_PAGE) - 1), pager = this.root.querySelector(".pager");
    pager.replaceChildren();
    if (!lastPage) return;
    const targets = [["first", 0], ["previous", this.page - 1], ["next", this.page + 1], ["last", lastPage]];
    targets.forEach(([name, page], i) => {
      const button = addElement("button", pager, name);
      button.type = "button";
      button.disabled = page < 0 || page > lastPage || page === this.page;
      button.addEventListener("click", () => {
        this.page = page;
        this.show();
        pager.children[i].focus();
      });
    });
    addElement("span", pager, `page ${this.page + 1} of ${lastPage + 1}`);
  }
}

class SampleSource {
  constructor(data) {
    this.data = data;
    this.texts = data.ids.map((id, i) =>
      [id, data.prompts[i], data.references[i], data.responses[i] || ""].join("\n").toLowerCase());
    this.subsets = data.positions.map((position) => data.bounds.findIndex((bound) => bound > position) - 1);
  }

  total() {
    return this.data.ids.length;
  }

  fillMenus({ subset, sort }) {
    addOption(subset, "", "all");
    for (let i = 0; i + 1 < this.data.bounds.length; i++) addOption(subset, String(i), `subset ${i + 1}`);
    const orders = [["positions", "difficulty ranking"], ["rouge_l", "ROUGE-L, lowest first"],
      ["cross_entropy", "cross-entropy, highest first"], ["visits", "visits, most first"]];
    for (const [column, text] of orders) if (this.data[column]) addOption(sort, column, text);
  }

  filter({ subset, sort }, query) {
    const matches = [];
    for (let i = 0; i < this.texts.length; i++) {
      if ((subset === "" || this.subsets[i] === Number(subset)) && (!query || this.texts[i].includes(query))) matches.push(i);
    }
    const values = this.data[sort], sign = sort === "rouge_l" ? 1 : -1;
    return sort === "positions" ? matches : matches.sort((a, b) => sign * (values[a] - values[b]) || a - b);
  }

  row(i, query) {
    const { data } = this, subset = this.subsets[i];
    const fillSummary = (values) => {
      const chip = addElement("span", values, undefined, "chip");
      if (subset >= 0) {
        chip.style.background = `var(--s${subset})`;
        addElement("span", values, `subset ${subset + 1}`);
      }
      addElement("span", values, `#${data.positions[i] + 1}`);
      if (data.rouge_l) addElement("span", values, `ROUGE-L ${data.rouge_l[i].toFixed(1)}`);
      if (data.cross_entropy) addElement("span", values, `cross-entropy ${data.cross_entropy[i].toFixed(2)}`);
      if (data.visits) addElement("span", values, `visits ${data.visits[i]}`);
    };
    const fillContent = (row) => {
      const columns = addElement("div", row, undefined, "answers"), score = data.rouge_l ? data.rouge_l[i] : null;
      addColumn(columns, "prompt", null, data.prompts[i], query);
      addColumn(columns, "reference", null, data.references[i], query);
      addColumn(columns, "student before training", score, data.responses[i], query);
    };
    return createRow(fillSummary, data.prompts[i], query, fillContent, data.ids[i]);
  }
}

const RELATIONS = { better: (a, b) => a > b, worse: (a, b) => a < b, equal: (a, b) => a === b };

class ItemSource {
  constructor(benchmarks) {
    this.benchmarks = benchmarks;
    this.current = benchmarks[0];
    this.texts = benchmarks.map(({ ids, prompts, references, answers }) => ids.map((id, i) =>
      [id, prompts[i], ...references[i], ...answers.map((texts) => texts[i])].join("\n").toLowerCase()));
  }

  total() {
    return this.current.ids.length;
  }

  fillMenus({ benchmark, left, relation, right }) {
    this.benchmarks.forEach(({ name }, i) => addOption(benchmark, String(i), name));
    addOption(left, "", "(all items)");
    this.current.models.forEach((name, i) => { addOption(left, String(i), name); addOption(right, String(i), name); });
    for (const name of Object.keys(RELATIONS)) addOption(relation, name, name);
    relation.disabled = right.disabled = true;
    left.addEventListener("change", () => { relation.disabled = right.disabled = left.value === ""; });
  }

  filter({ benchmark, left, relation, right }, query) {
    this.current = this.benchmarks[Number(benchmark)];
    const texts = this.texts[Number(benchmark)], { scores } = this.current, matches = [];
    const matchesRelation = (i) => left === "" || RELATIONS[relation](scores[Number(left)][i], scores[Number(right)][i]);
    for (let i = 0; i < texts.length; i++) if (matchesRelation(i) && (!query || texts[i].includes(query))) matches.push(i);
    if (left === "" || relation === "equal") return matches;
    // The largest differences come first.
    const difference = (i) => Math.abs(scores[Number(left)][i] - scores[Number(right)][i]);
    return matches.sort((a, b) => difference(b) - difference(a) || a - b);
  }

  row(i, query) {
    const { models, scores, prompts, references, answers, ids } = this.current;
    const fillSummary = (values) => models.forEach((name, model) => {
      addElement("b", addElement("span", values, `${name} `), scores[model][i].toFixed(1), "score");
    });
    const fillContent = (row) => {
      addText(row, prompts[i], query, "question");
      const columns = addElement("div", row, undefined, "answers");
      addColumn(columns, "reference", null, references[i], query, "reference");
      models.forEach((name, model) => {
        const css = name === "student after" ? "m-student" : "";
        addColumn(columns, name, scores[model][i], answers[model][i], query, css);
      });
    };
    return createRow(fillSummary, prompts[i], query, fillContent, ids[i]);
  }
}

function createList(name, createSource) {
  const root = document.querySelector(`[data-list="${name}"]`);
  return root ? new FilterList(root, createSource()) : null;
}

const SAMPLES = createList("samples", () => new SampleSource(DATA.samples));
const ITEMS = createList("items", () => new ItemSource(DATA.items));

// Opens the sample at a position of the ranking, or the next one that is on the page.
window.showSample = (position) => {
  if (!SAMPLES) return;
  SAMPLES.input.value = "";
  SAMPLES.menus.subset.value = "";
  SAMPLES.menus.sort.value = "positions";
  SAMPLES.filter();
  const index = Math.max(0, DATA.samples.positions.findIndex((candidate) => candidate >= position));
  SAMPLES.page = Math.floor(index / ROWS_PER_PAGE);
  SAMPLES.show(index % ROWS_PER_PAGE);
  SAMPLES.root.scrollIntoView({ block: "start" });
};
