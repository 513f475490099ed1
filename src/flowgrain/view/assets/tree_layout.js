// Positions of the rows of a tree: noise level to the right, images from top to bottom.

export const SLOT = 44;
export const THUMBNAIL = 38;
const WIDTH = 880;

/** Rows and edges to draw.
 *
 * `folded` are rows whose descendants are hidden. With `chains`, rows in the middle of a chain of equal
 * steps are left out, and the edge over them has their number in `steps`.
 */
export function layout(tree, advantage, {folded, chains}) {
  const column = Math.max(26, WIDTH / tree.num_steps);
  const visible = visibleRows(tree, folded);
  const y = positions(tree, visible, folded);
  const hidden = new Set(chains ? visible.filter((row) => inChain(tree, advantage, row, folded)) : []);
  const nodes = visible
    .filter((row) => !hidden.has(row))
    .map((row) => ({
      row, x: tree.grid_index[row] * column, y: y.get(row),
      leaf: tree.channels.has(row), folded: folded.has(row), advantage: advantage.get(row) ?? null,
    }));
  const byRow = new Map(nodes.map((node) => [node.row, node]));
  const edges = [];
  for (const node of nodes) {
    let [from, steps] = [tree.parent[node.row], 1];
    for (; hidden.has(from); from = tree.parent[from]) steps += 1;
    if (from < 0) continue;
    edges.push({from: byRow.get(from), to: node, steps, stochastic: tree.stochastic[node.row], credited: advantage.has(node.row), advantage: node.advantage});
    node.above = byRow.get(from);
  }
  const height = Math.max(SLOT, ...nodes.map((node) => node.y + SLOT / 2));
  return {nodes, edges, byRow, column, width: tree.num_steps * column, height};
}

/** Rows without a folded ancestor, parents before children, in the order of the drawing. */
function visibleRows(tree, folded) {
  const roots = tree.parent.flatMap((parent, row) => (parent < 0 ? [row] : []));
  const rows = [];
  const open = roots.reverse();
  while (open.length) {
    const row = open.pop();
    rows.push(row);
    if (!folded.has(row)) open.push(...[...tree.children[row]].reverse());
  }
  return rows;
}

function positions(tree, visible, folded) {
  const y = new Map();
  let slot = SLOT / 2;
  for (const row of visible) {
    if (tree.children[row].length && !folded.has(row)) continue;
    y.set(row, slot);
    slot += SLOT;
  }
  for (const row of [...visible].reverse()) {
    if (y.has(row)) continue;
    const below = tree.children[row].map((child) => y.get(child));
    y.set(row, (Math.min(...below) + Math.max(...below)) / 2);
  }
  return y;
}

/** Whether the steps before and after a row look the same and nothing else happens at the row. */
function inChain(tree, advantage, row, folded) {
  const [child, ...others] = tree.children[row];
  if (child === undefined || others.length || folded.has(row)) return false;
  if (tree.parent[row] < 0 || tree.channels.has(row)) return false;
  return tree.stochastic[row] === tree.stochastic[child] && advantage.get(row) === advantage.get(child);
}

/** The path of an edge: a curve that leaves and arrives horizontally. */
export function edgePath({from, to}) {
  const middle = from.x + Math.min(60, (to.x - from.x) / 2);
  return `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${Math.min(to.x, middle + (middle - from.x))} ${to.y}L${to.x} ${to.y}`;
}
