// A client in Node: the package better-sqlite3, with a SQLite of its own linked in. NODE_MODULES says where the
// package is. See README.md.
import { createRequire } from 'node:module';
import { path, worker, extension, work } from './common.mjs';

const Database = createRequire(process.env.NODE_MODULES + '/')('better-sqlite3');

const first = new Database(path, { timeout: 0 });
if (extension) first.loadExtension(extension);
const second = new Database(path, { timeout: 0 });
const both = [first, second];

const status = both.map((db) => db.pragma('turnstile_status', { simple: true })).map((text) => (typeof text === 'string' ? text : null));
const inserts = both.map((db) => db.prepare('INSERT INTO rows VALUES(?, ?)'));
const counted = first.prepare('SELECT count(*) FROM rows WHERE worker = ?').pluck();

work({
  insert: (i, seq) => inserts[i].run(worker, seq),
  count: () => counted.get(worker),
  close: () => both.reverse().forEach((db) => db.close()),
  sqlite: first.prepare('SELECT sqlite_version()').pluck().get(),
  status,
});

// Without the environment's teardown: a statement collected there aborts in RemoveEnvironmentCleanupHook.
process.exit(0);
