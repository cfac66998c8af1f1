// A client in Node: the package better-sqlite3, with a SQLite of its own linked in. NODE_MODULES says where the
// package is. See README.md.
import { createRequire } from 'node:module';
import { path, worker, extension, timeout, work } from './common.mjs';

const require = createRequire(process.env.NODE_MODULES + '/');
const Database = require('better-sqlite3');

const first = new Database(path, { timeout });
if (extension) first.loadExtension(extension);
const second = new Database(path, { timeout });
const both = [first, second];

// Every statement stays referenced to the end: one that is collected without a context entered aborts the process, now
// and then (RemoveEnvironmentCleanupHook), with or without turnstile. So db.pragma(), which drops its own, is not used.
const kept = (globalThis.kept = []);
const prepare = (db, sql) => (kept.push(db.prepare(sql)), kept.at(-1));

const status = both.map((db) => prepare(db, 'PRAGMA turnstile_status')).map((asked) => (asked.reader ? asked.pluck().get() : null));
const inserts = both.map((db) => prepare(db, 'INSERT INTO rows VALUES(?, ?)'));
const counted = prepare(first, 'SELECT count(*) FROM rows WHERE worker = ?').pluck();

await work({
  execute: (i, sql) => both[i].exec(sql),
  insert: (i, seq) => inserts[i].run(worker, seq),
  count: () => counted.get(worker),
  close: () => both.reverse().forEach((db) => db.close()),
  client: `better-sqlite3 ${require('better-sqlite3/package.json').version}, Node ${process.versions.node}`,
  sqlite: prepare(first, 'SELECT sqlite_version()').pluck().get(),
  status,
});

// Without the environment's teardown, for the same reason.
process.exit(0);
