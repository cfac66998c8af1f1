<?php
// A client in PHP: PDO, which cannot load an extension before PHP 8.4. See README.md.
require __DIR__ . '/common.php';

function connect(): PDO
{
    global $path;
    return new PDO("sqlite:$path", null, null, [PDO::ATTR_TIMEOUT => 0]);
}

$both = [connect(), connect()];
foreach ($both as $db) {
    $status[] = $db->query('PRAGMA turnstile_status')->fetchColumn() ?: null;
}
$inserts = array_map(fn($db) => $db->prepare('INSERT INTO rows VALUES(?, ?)'), $both);
$counted = $both[0]->prepare('SELECT count(*) FROM rows WHERE worker = ?');

work(
    execute: fn($i, $sql) => $both[$i]->exec($sql),
    insert: fn($i, $seq) => $inserts[$i]->execute([$worker, $seq]),
    count: function () use ($counted, $worker) {
        $counted->execute([$worker]);
        $seen = $counted->fetchColumn();
        $counted->closeCursor();
        return $seen;
    },
    close: function () use (&$both, &$inserts, &$counted, &$db) {
        $both = $inserts = [];
        $counted = $db = null;
    },
    client: 'PHP ' . PHP_VERSION,
    sqlite: $both[0]->query('SELECT sqlite_version()')->fetchColumn(),
    status: $status,
);
