// Markdown that nobody need trust.

import { marked } from "./vendor/marked.esm.js";

// What Markdown makes, but for pictures: nothing that loads from elsewhere, asks for input, or looks like part of the page.
const ALLOWED_TAGS = ["p", "br", "hr", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6"];
const ALLOWED_ATTR = ["href", "title", "align", "start"];
const sentences = new Intl.Segmenter(undefined, { granularity: "sentence" });

/** Fills `element`. While the answer is `growing`, the sentence that is still being written is marked off. */
export function render(element, text, growing) {
  const clean = DOMPurify.sanitize(marked.parse(text, { breaks: true }), {
    ALLOWED_TAGS,
    ALLOWED_ATTR,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of clean.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  // What scrolls by itself can be reached by keyboard.
  for (const wide of clean.querySelectorAll("pre, table")) wide.tabIndex = 0;
  if (growing) markLastSentence(clean);
  update(element, clean);
}

// What is as it was stays, and with it what somebody has selected there.
function update(element, fresh) {
  let kept = 0;
  while (kept < element.childNodes.length && fresh.firstChild?.isEqualNode(element.childNodes[kept])) {
    fresh.firstChild.remove();
    kept += 1;
  }
  while (element.childNodes.length > kept) element.lastChild.remove();
  element.append(fresh);
}

/** How many characters of a growing text are whole sentences. */
export function finishedLength(text) {
  return [...sentences.segment(text)].at(-1)?.index ?? 0;
}

function markLastSentence(fragment) {
  const block = [...fragment.querySelectorAll("p, li, td, h1, h2, h3, h4, h5, h6, blockquote")].at(-1);
  if (!block) return;
  let skip = finishedLength(block.textContent);
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (let node of texts) {
    if (skip >= node.length) {
      skip -= node.length;
      continue;
    }
    if (skip > 0) node = node.splitText(skip);
    skip = 0;
    const span = document.createElement("span");
    span.className = "writing";
    node.replaceWith(span);
    span.append(node);
  }
}
