// Elements without markup: whatever the server says arrives as text nodes and nothing else.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return a new element; strings among `children` become text.
 * @param {string} tag
 * @param {Record<string, string | number | boolean | null | undefined>} [attributes] null: left out
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. @returns {SVGElement} */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children);
  return node;
}

/** Return the element of the page with this id. @param {string} id @returns {any} */
export function byId(id) {
  const node = document.getElementById(id);
  if (node === null) throw new Error(`the page has no #${id}`);
  return node;
}

/** Set a node's text if it is another one. @param {Node} node @param {string} text */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Set an attribute if it is another one. @param {Element} node @param {string} name */
export function set(node, name, value) {
  const text = String(value);
  if (node.getAttribute(name) !== text) node.setAttribute(name, text);
}

/** Give a bar's piece its width as a share of 1. @param {HTMLElement} piece */
export function widen(piece, share) {
  // Through the object model: the page's policy refuses style attributes.
  piece.style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
}

/**
 * Keep one child per item in `host`, in order, made once and updated in place: focus, scrolling
 * and hovering survive.
 * @template T
 * @param {HTMLElement} host
 * @param {T[]} items
 * @param {(item: T) => string} keyOf
 * @param {(item: T) => HTMLElement} make
 * @param {(node: HTMLElement, item: T) => void} update
 */
export function keep(host, items, keyOf, make, update) {
  const known = new Map(Array.from(host.children, (child) => [child.dataset.key, child]));
  let place = host.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = known.get(key);
    known.delete(key);
    if (node === undefined) {
      node = make(item);
      node.dataset.key = key;
    }
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else host.insertBefore(node, place);
  }
  for (const gone of known.values()) gone.remove();
}

/**
 * Fill a fieldset with radio buttons.
 * @param {HTMLElement} host
 * @param {[string, string][]} options value and label
 * @param {string} chosen
 * @param {(value: string) => void} onChoice
 */
export function choices(host, options, chosen, onChoice) {
  for (const [value, label] of options) {
    const input = el("input", { type: "radio", name: host.id, value, checked: value === chosen });
    input.addEventListener("change", () => onChoice(value));
    host.append(el("label", {}, input, label));
  }
}

/**
 * Let arrow keys, Home and End move the focus between the buttons of a list, which is one stop of
 * the Tab key.
 * @param {HTMLElement} list
 */
export function rove(list) {
  const buttons = () => Array.from(list.querySelectorAll("button"));
  list.addEventListener("focusin", (event) => {
    for (const button of buttons()) button.tabIndex = button === event.target ? 0 : -1;
  });
  list.addEventListener("keydown", (event) => {
    const all = buttons();
    const at = all.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || all[to] === undefined) return;
    event.preventDefault();
    all[to].focus();
  });
}

/** After a list has changed: exactly one of its buttons can be reached by Tab. */
export function roveAgain(list) {
  const all = Array.from(list.querySelectorAll("button"));
  if (all.length > 0 && !all.some((button) => button.tabIndex === 0)) all[0].tabIndex = 0;
}
