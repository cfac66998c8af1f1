// What the Node workers share. See README.md.
import fs from 'node:fs';

export const [path, worker, rows, record] = process.argv.slice(2);
export const extension = process.env.TURNSTILE_EXTENSION;
export const timeout = Number(process.env.WORKER_TIMEOUT ?? 0);
const end = Date.now() + 1000 * Number(process.env.WORKER_SECONDS ?? 60);

const isBusy = (e) => /locked/.test(e.message);

/**
 * Runs the protocol on two connections: `execute(i, sql)`, `insert(i, seq)`, `count()` and `close()`, which may be
 * asynchronous; `status`: the answers of the pragma.
 */
export async function work({ execute, insert, count, close, client, sqlite, status }) {
  async function transaction(i, seq) {
    await execute(i, 'BEGIN');
    try {
      await insert(i, seq);
      await execute(i, 'COMMIT');
    } catch (e) {
      await execute(i, 'ROLLBACK');
      throw e;
    }
  }

  fs.writeSync(1, 'ready\n');
  fs.readSync(0, Buffer.alloc(16));

  let attempts = 0, committed = 0, busy = 0;
  const log = fs.openSync(record, 'a');
  while (committed < Number(rows) && Date.now() < end) {
    attempts++;
    try {
      await (committed % 4 > 1 ? transaction : insert)(committed % 2, committed);
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
      seen = await count();
    } catch (e) {
      if (!isBusy(e) || Date.now() > end) throw e;
      busy++;
    }
  }
  await close();
  fs.writeSync(1, JSON.stringify({ worker, attempts, committed, busy, seen, client, sqlite, status }) + '\n');
}
