// A client in Node: `node:sqlite`, whose SQLite is part of the node binary. See README.md.
import { DatabaseSync } from 'node:sqlite';
import { path, worker, extension, timeout, work } from './common.mjs';

const first = new DatabaseSync(path, { allowExtension: true, timeout });
if (extension) first.loadExtension(extension);
const second = new DatabaseSync(path, { timeout });
const both = [first, second];

const status = both.map((db) => Object.values(db.prepare('PRAGMA turnstile_status').get() ?? {})[0] ?? null);
const inserts = both.map((db) => db.prepare('INSERT INTO rows VALUES(?, ?)'));
const counted = first.prepare('SELECT count(*) AS n FROM rows WHERE worker = ?');

await work({
  execute: (i, sql) => both[i].exec(sql),
  insert: (i, seq) => inserts[i].run(worker, seq),
  count: () => counted.get(worker).n,
  close: () => both.reverse().forEach((db) => db.close()),
  client: `Node ${process.versions.node}`,
  sqlite: first.prepare('SELECT sqlite_version() AS v').get().v,
  status,
});
