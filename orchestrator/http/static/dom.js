// Elements and numbers.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An HTML element with attributes and children. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element with attributes and children. */
export function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const NONE = "–";

export const number = (value, digits) => (value === null ? NONE : value.toFixed(digits));

export const percent = (share) => (share === null ? NONE : `${(100 * share).toFixed(0)} %`);

export function seconds(value) {
  if (value === null) return NONE;
  return value < 1 ? `${(1000 * value).toFixed(0)} ms` : `${value.toFixed(2)} s`;
}

/** A function that calls `action`, at most once per `periodMs`; the last call is never lost. */
export function throttled(action, periodMs) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    setTimeout(() => {
      isDue = false;
      action();
    }, periodMs);
  };
}
