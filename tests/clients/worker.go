// A client in Go: mattn/go-sqlite3 over database/sql. See README.md.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/mattn/go-sqlite3"
)

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func isBusy(err error) bool {
	var e sqlite3.Error
	return errors.As(err, &e) && e.Code == sqlite3.ErrBusy
}

func open(driver, name string) *sql.Conn {
	pool, err := sql.Open(driver, name)
	must(err)
	conn, err := pool.Conn(context.Background())
	must(err)
	return conn
}

// The driver reads a new connection's database before it calls ConnectHook, which is too late to adopt it where
// the database is in WAL mode. So the extension is loaded by a connection to nothing, and all that follow have it
// as their default VFS.
func loadExtension(extension string) {
	sql.Register("loading", &sqlite3.SQLiteDriver{
		ConnectHook: func(conn *sqlite3.SQLiteConn) error {
			return conn.LoadExtension(extension, "sqlite3_turnstile_init")
		},
	})
	must(open("loading", ":memory:").Close())
}

// Every other pair of rows is written in a transaction of its own.
func insert(conn *sql.Conn, worker string, seq int) error {
	ctx := context.Background()
	const row = "INSERT INTO rows VALUES(?, ?)"
	if seq%4 < 2 {
		_, err := conn.ExecContext(ctx, row, worker, seq)
		return err
	}
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if _, err = tx.ExecContext(ctx, row, worker, seq); err != nil {
		tx.Rollback()
		return err
	}
	return tx.Commit()
}

func status(conn *sql.Conn) *string {
	var text string
	err := conn.QueryRowContext(context.Background(), "PRAGMA turnstile_status").Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	must(err)
	return &text
}

func main() {
	path, worker, record := os.Args[1], os.Args[2], os.Args[4]
	rows, err := strconv.Atoi(os.Args[3])
	must(err)
	seconds, err := strconv.ParseFloat(os.Getenv("WORKER_SECONDS"), 64)
	if err != nil {
		seconds = 60
	}
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	ctx := context.Background()

	if extension := os.Getenv("TURNSTILE_EXTENSION"); extension != "" {
		loadExtension(extension)
	}
	// With the driver's own `PRAGMA busy_timeout = 5000`: the 0 that the other clients have would be said by that
	// pragma too, and mean that this one does not want to wait.
	both := []*sql.Conn{open("sqlite3", "file:"+path), open("sqlite3", "file:"+path)}
	states := []*string{status(both[0]), status(both[1])}

	fmt.Println("ready")
	bufio.NewReader(os.Stdin).ReadString('\n')

	acknowledged, err := os.OpenFile(record, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
	must(err)
	attempts, committed, busy := 0, 0, 0
	for committed < rows && time.Now().Before(end) {
		attempts++
		err := insert(both[committed%2], worker, committed)
		if isBusy(err) {
			busy++
			continue
		}
		must(err)
		fmt.Fprintf(acknowledged, "%s %d\n", worker, committed)
		committed++
	}

	seen := -1
	for seen < 0 {
		err := both[0].QueryRowContext(ctx, "SELECT count(*) FROM rows WHERE worker = ?", worker).Scan(&seen)
		if isBusy(err) && time.Now().Before(end) {
			busy++
			continue
		}
		must(err)
	}
	for _, conn := range both {
		// Closes the SQLite connection itself, where Close would only give it back to its pool.
		conn.Raw(func(driver any) error { return driver.(*sqlite3.SQLiteConn).Close() })
	}
	version, _, _ := sqlite3.Version()
	must(json.NewEncoder(os.Stdout).Encode(map[string]any{
		"worker": worker, "attempts": attempts, "committed": committed, "busy": busy, "seen": seen,
		"client": runtime.Version(), "sqlite": version, "status": states,
	}))
}
