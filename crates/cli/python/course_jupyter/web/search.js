"use strict";
// INDEX, of index.js: [page, anchor, lesson, heading, text] of every section.
const field = document.getElementById("search");
const found = document.getElementById("found");
const LONGEST = 20;

function plain(text) {
  return text.toLowerCase();
}

/** The sections that hold every word, those first that have them in their heading. */
function hits(words) {
  const scored = [];
  for (const [page, anchor, lesson, heading, text] of INDEX) {
    const [head, body] = [plain(lesson + " " + heading), plain(text)];
    if (!words.every((word) => head.includes(word) || body.includes(word))) continue;
    const score = words.filter((word) => head.includes(word)).length;
    scored.push({ page, anchor, lesson, heading, text, score });
  }
  return scored.sort((a, b) => b.score - a.score).slice(0, LONGEST);
}

function around(text, word) {
  const at = Math.max(0, plain(text).indexOf(word) - 60);
  return (at ? "… " : "") + text.slice(at, at + 160).trim() + (text.length > at + 160 ? " …" : "");
}

function show() {
  const words = plain(field.value).split(/\s+/).filter((word) => word.length > 1);
  found.replaceChildren();
  found.hidden = words.length === 0;
  if (found.hidden) return;
  const all = hits(words);
  for (const hit of all) {
    const [item, link, text] = ["li", "a", "small"].map((name) => document.createElement(name));
    link.href = hit.page + (hit.heading === hit.lesson ? "" : "#" + encodeURIComponent(hit.anchor));
    link.textContent = hit.heading === hit.lesson ? hit.lesson : `${hit.lesson} – ${hit.heading}`;
    link.addEventListener("click", () => { field.value = ""; found.hidden = true; });
    text.textContent = around(hit.text, words[0]);
    item.append(link, text);
    found.append(item);
  }
  if (all.length === 0) found.append("Nothing holds all of these words.");
}

field.addEventListener("input", show);
