<?php
// A client in PHP: the class SQLite3, which loads extensions from the directory that `sqlite3.extension_dir` names. See
// README.md.
require __DIR__ . '/common.php';

function connect(?string $load): SQLite3
{
    global $path;
    $db = new SQLite3($path, SQLITE3_OPEN_READWRITE);
    $db->enableExceptions(true);
    if ($load) {
        $db->loadExtension(basename($load));
    }
    return $db;
}

$both = [connect($extension ?: null), connect(null)];
$inserts = [];
foreach ($both as $db) {
    $status[] = $db->querySingle('PRAGMA turnstile_status') ?: null;
    $inserts[] = $db->prepare('INSERT INTO rows VALUES(:worker, :seq)');
}

work(
    execute: fn($i, $sql) => $both[$i]->exec($sql),
    insert: function ($i, $seq) use ($inserts, $worker) {
        $inserts[$i]->bindValue(':worker', $worker);
        $inserts[$i]->bindValue(':seq', $seq, SQLITE3_INTEGER);
        $inserts[$i]->execute()->finalize();
    },
    count: fn() => $both[0]->querySingle("SELECT count(*) FROM rows WHERE worker = '$worker'"),
    close: function () use ($both) {
        array_map(fn($db) => $db->close(), array_reverse($both));
    },
    client: 'PHP ' . PHP_VERSION,
    sqlite: SQLite3::version()['versionString'],
    status: $status,
);
