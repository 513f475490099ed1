// Plain values as lines of YAML.

const PLAIN = /^[A-Za-z_/.][\w /.+@()-]*$/;
const WORDS = /^(true|false|null|yes|no|on|off|~)$/i;
const INLINE = 72;

/** Lines `{indent, key, text}` of an object or a list. */
export function yamlLines(value, indent = 0) {
  return Object.entries(value).flatMap(([name, item]) => {
    const key = Array.isArray(value) ? "- " : `${scalar(name)}: `;
    const short = inline(item);
    if (short !== null) return [{indent, key, text: short}];
    const lines = yamlLines(item, indent + 1);
    if (key !== "- ") return [{indent, key: key.trimEnd(), text: ""}, ...lines];
    const [first, ...others] = lines; // the first entry is on the line of the dash
    return [{...first, indent, key: `- ${first.key}`}, ...others];
  });
}

/** A value on one line, or null if it is an object with entries or too long. */
function inline(value) {
  if (value === null || typeof value !== "object") return scalar(value);
  if (!Array.isArray(value)) return Object.keys(value).length ? null : "{}";
  const parts = value.map(inline);
  const text = `[${parts.join(", ")}]`;
  return parts.includes(null) || text.length > INLINE ? null : text;
}

function scalar(value) {
  if (typeof value !== "string") return String(value);
  return PLAIN.test(value) && !WORDS.test(value) && value.trim() === value ? value : JSON.stringify(value);
}
