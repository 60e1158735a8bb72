// What a session's slots are, as plain values: spans in order, oldest first, and how they change.
// A span is {share, level, slots, start, end, rounds}: the slots that tokens [start, end) take.
//
// Between a turn's beginning and its end the server tells of each compaction, and this follows: a
// compaction comes exactly when the budget is full, so the tokens seen by then follow from it.

/** The server's layout; raw spans that follow each other are one. */
export function spansOf(layout) {
  const spans = [];
  for (const { share, level, slots, tokens_start, tokens_end, rounds } of layout) {
    const last = spans.at(-1);
    if (share === "tail" && last?.share === "tail") {
      spans[spans.length - 1] = { ...last, slots: last.slots + slots, end: tokens_end };
    } else {
      spans.push({ share, level, slots, start: tokens_start, end: tokens_end, rounds });
    }
  }
  return spans;
}

export const slotsOf = (spans) => spans.reduce((sum, span) => sum + span.slots, 0);

export const tokensOf = (spans) => spans.at(-1)?.end ?? 0;

/** With `tokens` more raw ones. */
export function grown(spans, tokens) {
  if (tokens <= 0) return spans;
  const last = spans.at(-1);
  if (last?.share === "tail") {
    return [...spans.slice(0, -1), { ...last, slots: last.slots + tokens, end: last.end + tokens }];
  }
  const start = tokensOf(spans);
  const raw = { share: "tail", level: 0, slots: tokens, start, end: start + tokens, rounds: 0 };
  return [...spans, raw];
}

/** After a compaction, as the server tells of one. */
export function compacted(spans, event) {
  const { tokens_start: start, tokens_end: end, slots_after, level, rounds } = event;
  const made = { share: "memory", level, slots: slots_after, start, end, rounds };
  const before = spans.filter((span) => span.end <= start);
  const after = spans
    .filter((span) => span.end > end)
    .map((span) => (span.start >= end ? span : { ...span, start: end, slots: span.end - end }));
  return [...before, made, ...after];
}

/** The slots that a span's tokens took in an earlier layout: what an animation begins from. */
export function slotsBefore(spans, { start, end }) {
  let slots = 0;
  for (const span of spans) {
    const common = Math.min(end, span.end) - Math.max(start, span.start);
    if (common > 0) slots += (span.slots * common) / (span.end - span.start);
  }
  return slots;
}

/**
 * Where a session has been: [tokens, slots] corners, oldest first, from its turns backwards.
 * turns: the newest ones, each with `tokens` and the `steps` of its compactions, [start, end,
 * slots before, slots after, level]; budget: the slots at which a compaction comes.
 */
export function corners(turns, tokens, slots, budget) {
  let held = slots;
  let seen = tokens;
  for (const turn of turns) {
    seen -= turn.tokens;
    held -= turn.tokens - freed(turn);
  }
  const path = [[Math.max(0, seen), Math.max(0, held)]];
  for (const turn of turns) {
    const end = seen + turn.tokens;
    for (const [, , before, after] of turn.steps) {
      const full = Math.max(0, Math.min(budget - held, end - seen));
      seen += full;
      held += full;
      path.push([seen, held]);
      held -= before - after;
      path.push([seen, held]);
    }
    held += end - seen;
    seen = end;
    path.push([seen, held]);
  }
  return path;
}

const freed = ({ steps }) => steps.reduce((sum, [, , before, after]) => sum + before - after, 0);
