// Numbers, times and names as text.

const MINUS = "\u2212";
const NONE = "\u2013";

/** A number with about four significant digits. Missing numbers are a dash. */
export function number(value, digits = 4) {
  if (value == null || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    return value.toExponential(2).replace("e+", "e").replaceAll("-", MINUS);
  }
  const decimals = size >= 1000 ? 0 : Math.max(0, digits - 1 - Math.max(0, Math.floor(Math.log10(size || 1))));
  return value.toFixed(Math.min(decimals, 3)).replace("-", MINUS);
}

/** A number with its sign. */
export const signed = (value) => (value > 0 ? "+" : "") + number(value);

/** A whole number with separators. */
export const count = (value) => (value == null ? NONE : Math.round(value).toLocaleString("en"));

/** A percentage of a share. */
export const percent = (value) => (value == null ? NONE : `${(100 * value).toFixed(1)}%`);

/** A duration in words. */
export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return NONE;
  if (seconds < 60) return `${number(seconds, 3)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

/** A date and time, in the local time zone. */
export function time(iso) {
  const date = new Date(iso);
  if (!iso || Number.isNaN(date.getTime())) return NONE;
  const pad = (value) => String(value).padStart(2, "0");
  const day = `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())}`;
  return `${day} ${pad(date.getHours())}:${pad(date.getMinutes())}`;
}

/** The mean of the finite numbers of a list, or null. */
export function mean(values) {
  const finite = values.filter((value) => Number.isFinite(value));
  return finite.length ? finite.reduce((a, b) => a + b, 0) / finite.length : null;
}

/** The standard deviation of the finite numbers of a list, or null. */
export function deviation(values) {
  const middle = mean(values);
  if (middle === null) return null;
  return Math.sqrt(mean(values.filter(Number.isFinite).map((value) => (value - middle) ** 2)));
}

/** The number of `sorted` that is nearest to `value`, or null. */
export function nearest(sorted, value) {
  return sorted.reduce(
    (best, step) => (best === null || Math.abs(step - value) < Math.abs(best - value) ? step : best),
    null,
  );
}
