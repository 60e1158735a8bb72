// What the page's parts share. What is shown of a session is what the server has saved of it; only
// a running turn is shown ahead of that.

export const state = {
  name: null, // of the open session
  session: null, // as the server has it
  budget: 1, // slots, of every session of this server
  said: [], // its newest turns
  spans: [], // its slots
  path: [], // the chart's corners
  // The running turn, of this session or another, at most one at a time: {name, draft, controller},
  // and what it has made of its session by now: {spans, path, compactions}.
  run: null,
};

/** By session: ms to the first text of replies made here, by turn number. */
export const moments = new Map();
