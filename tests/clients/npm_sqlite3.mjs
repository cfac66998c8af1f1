// A client in Node: the package sqlite3, which works in libuv's threads. NODE_MODULES says where the package is. See
// README.md.
import { createRequire } from 'node:module';
import { path, worker, extension, work } from './common.mjs';

const require = createRequire(process.env.NODE_MODULES + '/');
const sqlite3 = require('sqlite3');

const call = (start) => new Promise((done, failed) => start((e, value) => (e ? failed(e) : done(value))));
const ask = (db, sql, ...values) => call((then) => db.all(sql, values, then));

async function open(load) {
  let db;
  await call((then) => (db = new sqlite3.Database(path, then)));
  db.configure('busyTimeout', 0);
  if (load) await call((then) => db.loadExtension(load, then));
  return db;
}

const both = [await open(extension), await open(null)];
const status = [];
for (const db of both) status.push((await ask(db, 'PRAGMA turnstile_status'))[0]);

await work({
  execute: (i, sql) => ask(both[i], sql),
  insert: (i, seq) => ask(both[i], 'INSERT INTO rows VALUES(?, ?)', worker, seq),
  count: async () => (await ask(both[0], 'SELECT count(*) AS n FROM rows WHERE worker = ?', worker))[0].n,
  close: () => Promise.all(both.map((db) => call((then) => db.close(then)))),
  client: `sqlite3 ${require('sqlite3/package.json').version}, Node ${process.versions.node}`,
  sqlite: (await ask(both[0], 'SELECT sqlite_version() AS v'))[0].v,
  status: status.map((row) => (row ? Object.values(row)[0] : null)),
});
