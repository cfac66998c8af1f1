<?php
// What the two PHP workers share. See README.md.

[, $path, $worker, $rows, $record] = $argv;
$extension = getenv('TURNSTILE_EXTENSION');

function is_busy(Exception $e): bool
{
    return str_contains($e->getMessage(), 'locked');
}

/** Every other pair of rows is written in a transaction of its own. */
function write_row(callable $execute, callable $insert, int $seq): void
{
    if ($seq % 4 < 2) {
        $insert($seq);
        return;
    }
    $execute('BEGIN');
    try {
        $insert($seq);
        $execute('COMMIT');
    } catch (Exception $e) {
        $execute('ROLLBACK');
        throw $e;
    }
}

/** Runs the protocol on two connections; the functions are given the number of one of them. */
function work(callable $execute, callable $insert, callable $count, callable $close, string $client, string $sqlite,
    array $status): void
{
    global $worker, $rows, $record;
    $end = microtime(true) + (float) (getenv('WORKER_SECONDS') ?: 60);
    echo "ready\n";
    fgets(STDIN);

    $attempts = $committed = $busy = 0;
    $log = fopen($record, 'a');
    while ($committed < (int) $rows && microtime(true) < $end) {
        $i = $committed % 2;
        $attempts++;
        try {
            write_row(fn($sql) => $execute($i, $sql), fn($seq) => $insert($i, $seq), $committed);
        } catch (Exception $e) {
            if (!is_busy($e)) {
                throw $e;
            }
            $busy++;
            continue;
        }
        fwrite($log, "$worker $committed\n");
        $committed++;
    }
    for ($seen = null; $seen === null;) {
        try {
            $seen = $count();
        } catch (Exception $e) {
            if (!is_busy($e) || microtime(true) > $end) {
                throw $e;
            }
            $busy++;
        }
    }
    $close();
    $result = compact('worker', 'attempts', 'committed', 'busy', 'seen', 'client', 'sqlite', 'status');
    echo json_encode($result), "\n";
}
