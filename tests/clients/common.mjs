// What the two Node workers share. See README.md.
import fs from 'node:fs';

export const [path, worker, rows, record] = process.argv.slice(2);
export const extension = process.env.TURNSTILE_EXTENSION;
const end = Date.now() + 1000 * Number(process.env.WORKER_SECONDS ?? 60);

const isBusy = (e) => /locked/.test(e.message);

/** Runs the protocol on two connections: `insert(i, seq)`, `count()`, `close()`, and the answers of the pragma. */
export function work({ insert, count, close, sqlite, status }) {
  fs.writeSync(1, 'ready\n');
  fs.readSync(0, Buffer.alloc(16));

  let attempts = 0, committed = 0, busy = 0;
  const log = fs.openSync(record, 'a');
  while (committed < Number(rows) && Date.now() < end) {
    attempts++;
    try {
      insert(committed % 2, committed);
    } catch (e) {
      if (!isBusy(e)) throw e;
      busy++;
      continue;
    }
    fs.writeSync(log, `${worker} ${committed}\n`);
    committed++;
  }
  let seen = null;
  while (seen === null) {
    try {
      seen = count();
    } catch (e) {
      if (!isBusy(e) || Date.now() > end) throw e;
      busy++;
    }
  }
  close();
  fs.writeSync(1, JSON.stringify({ worker, attempts, committed, busy, seen, sqlite, status }) + '\n');
}
