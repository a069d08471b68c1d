"use strict";
// Shows the embedded completions, PAGE prompts at a time. Whatever comes from a model or a data set
// goes into the page as text nodes only.
(() => {
  const PAGE = 20;
  const CUT = 1200;
  const $ = (id) => document.getElementById(id);
  const controls = $("controls");
  if (!controls) return;
  const count = $("count");
  const list = $("prompts");
  const moreButton = $("more");
  const blocks = new Map(); // block number -> promise of its texts
  let index; // {models, block, prompts}
  let listed = []; // the prompts that match, in order
  let shown = 0;
  let ticket = 0; // a later request makes an earlier one stop

  const format = (number) => number.toLocaleString("en");

  function el(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function figure(value) {
    if (value === null || value === undefined) return "–";
    const text = Number.isInteger(value) ? String(value) : value.toFixed(2);
    return text.replace("-", "−");
  }

  async function decode(id) {
    const bytes = Uint8Array.from(atob($(id).textContent), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // --- texts ---------------------------------------------------------------------------------------

  // Controls, direction marks and overrides, line separators: seen instead of obeyed.
  const HIDDEN =
    /([\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;

  function visible(text) {
    if (text === "") return [el("i", { className: "mark" }, "empty")];
    return text.split(HIDDEN).map((part, at) => {
      if (at % 2 === 0) return part;
      const code = part.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
      return el("span", { className: "mark" }, `U+${code}`);
    });
  }

  function cut(text) {
    const last = text.charCodeAt(CUT - 1);
    return text.slice(0, last >= 0xd800 && last < 0xdc00 ? CUT - 1 : CUT); // no half character
  }

  function textBlock(text) {
    const box = el("div", { className: "text", dir: "auto" });
    if (text.length <= CUT) {
      box.append(...visible(text));
      return [box];
    }
    box.append(...visible(cut(text)), "…");
    const label = `show all (${format(text.length)} characters)`;
    const button = el("button", { type: "button", className: "show-all" }, label);
    button.addEventListener("click", () => {
      box.replaceChildren(...visible(text));
      box.tabIndex = -1;
      box.focus({ preventScroll: true });
      button.remove();
    });
    return [box, button];
  }

  // --- one prompt ----------------------------------------------------------------------------------

  function load(prompt) {
    const number = Math.floor(prompt.row / index.block);
    if (!blocks.has(number)) blocks.set(number, decode(`block-${number}`));
    return blocks.get(number);
  }

  async function withTexts(prompt) {
    prompt.texts = (await load(prompt))[prompt.row % index.block];
  }

  function columnNames(prompt) {
    const model = $("model").value;
    const best = Object.keys(prompt.figures).find((name) => name === list.dataset.best);
    return [...new Set(["base", ...(best ? [best] : []), model])];
  }

  function column(prompt, name, draw) {
    const box = el("section", { className: "column" });
    const title = name === "base" ? "base model" : name;
    const draws = prompt.figures[name] || [];
    box.append(el("h4", { dir: "auto" }, title));
    if (draws.length === 0) {
      box.append(el("p", { className: "meta" }, "no completion of this prompt"));
      return box;
    }
    const at = draw % draws.length;
    const parts = Object.entries(draws[at]).map(([key, value]) => `${key} ${figure(value)}`);
    if (draws.length > 1) parts.unshift(`draw ${at + 1} of ${draws.length}`);
    box.append(el("p", { className: "meta" }, parts.join(" · ")));
    box.append(...textBlock(prompt.texts[name][at]));
    return box;
  }

  function flipper(prompt, draws, draw) {
    const label = el("output", {}, `draw 1 of ${draws}`);
    let at = 0;
    const button = (text, step) => {
      const name = `${text} draw of prompt ${prompt.id}`;
      const node = el("button", { type: "button", className: text, ariaLabel: name });
      node.textContent = step < 0 ? "‹" : "›";
      node.addEventListener("click", () => {
        at = (at + step + draws) % draws;
        label.textContent = `draw ${at + 1} of ${draws}`;
        draw(at);
      });
      return node;
    };
    return el("div", { className: "flip" }, button("previous", -1), label, button("next", 1));
  }

  function promptText(prompt) {
    return prompt.prompt.map(([role, text]) => {
      const message = el("div", { className: "message" });
      if (role) message.append(el("span", { className: "role" }, role));
      message.append(...textBlock(text));
      return message;
    });
  }

  function card(prompt) {
    const names = columnNames(prompt);
    const columns = el("div", { className: "columns" });
    const draw = (at) => columns.replaceChildren(...names.map((name) => column(prompt, name, at)));
    const draws = Math.max(...names.map((name) => (prompt.figures[name] || []).length));
    const change = prompt.changes[$("model").value];
    const title = el("h3", { tabIndex: -1 }, el("bdi", {}, prompt.id));
    const sign = change > 0 ? "+" : "";
    const heading = el("p", { className: "change" }, `reward change ${sign}${figure(change)}`);
    const top = el("div", { className: "top" }, title, heading);
    if (draws > 1) top.append(flipper(prompt, draws, draw));
    draw(0);
    return el("article", {}, top, ...promptText(prompt), columns);
  }

  // --- all prompts ---------------------------------------------------------------------------------

  function sorted(prompts) {
    const model = $("model").value;
    const order = $("order").value;
    if (order === "data") return prompts.sort((a, b) => a.position - b.position);
    const sign = order === "regressions" ? 1 : -1;
    const change = ({ changes }) => (changes[model] === null ? Infinity : sign * changes[model]);
    return prompts.sort((a, b) => change(a) - change(b) || a.position - b.position);
  }

  async function matching() {
    const wanted = $("filter").value.trim();
    if (!wanted) return [...index.prompts];
    const pattern = new RegExp(wanted.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "iu");
    const everywhere = $("everywhere").checked;
    if (everywhere) {
      count.textContent = "searching…";
      await Promise.all(index.prompts.map(withTexts));
    }
    return index.prompts.filter(
      (prompt) =>
        prompt.prompt.some(([, text]) => pattern.test(text)) ||
        pattern.test(prompt.id) ||
        (everywhere &&
          columnNames(prompt).some((name) => (prompt.texts[name] || []).some((t) => pattern.test(t)))),
    );
  }

  async function refresh() {
    const mine = ++ticket;
    const found = sorted(await matching());
    if (mine !== ticket) return;
    [listed, shown] = [found, 0];
    list.replaceChildren();
    await more();
  }

  async function more() {
    const mine = ++ticket;
    const next = listed.slice(shown, shown + PAGE);
    await Promise.all(next.map(withTexts));
    if (mine !== ticket) return;
    const cards = next.map(card);
    list.append(...cards);
    shown += next.length;
    const all = index.prompts.length;
    count.textContent =
      `showing ${format(shown)} of ${format(listed.length)}` +
      (listed.length < all ? ` that match, of ${format(all)}` : "");
    moreButton.hidden = shown >= listed.length;
    return cards[0];
  }

  function fail(error) {
    count.textContent = `The completions cannot be shown: ${error.message}`;
  }

  function listen() {
    let timer;
    $("filter").addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => refresh().catch(fail), 150);
    });
    for (const id of ["everywhere", "order", "model"]) {
      $(id).addEventListener("change", () => refresh().catch(fail));
    }
    controls.addEventListener("submit", (event) => event.preventDefault());
    moreButton.addEventListener("click", () => {
      more().then((first) => first?.querySelector("h3").focus({ preventScroll: true }), fail);
    });
  }

  async function start() {
    if (!("DecompressionStream" in window)) {
      throw new Error("this browser is too old to unpack them (it lacks DecompressionStream)");
    }
    index = await decode("index");
    index.prompts.forEach((prompt, row) => (prompt.row = row));
    listen();
    await refresh();
    $("fields").disabled = false;
  }

  // Lets the browser paint the page before anything is unpacked.
  requestAnimationFrame(() => setTimeout(() => start().catch(fail)));
})();
