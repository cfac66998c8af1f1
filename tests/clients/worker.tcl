# A client in Tcl. See README.md.
package require sqlite3

lassign $argv path worker rows record
proc setting {name otherwise} { expr {[info exists ::env($name)] ? $::env($name) : $otherwise} }
set end [expr {[clock milliseconds] + 1000 * [setting WORKER_SECONDS 60]}]
set extension [setting TURNSTILE_EXTENSION ""]

sqlite3 first $path
if {$extension ne ""} {
    first enable_load_extension 1
    first eval {SELECT load_extension($extension)}
    first enable_load_extension 0
}
sqlite3 second $path

# A string of JSON, or null.
proc quoted {text} { expr {$text eq "" ? "null" : "\"[string map {\\ \\\\ \" \\\"} $text]\""} }

foreach db {first second} { lappend status [quoted [$db onecolumn {PRAGMA turnstile_status}]] }

# Every other pair of rows is written in a transaction of its own, which Tcl's command rolls back for an error.
proc write {db seq} {
    set insert {$db eval {INSERT INTO rows VALUES($::worker, $seq)}}
    if {$seq % 4 > 1} { $db transaction $insert } else $insert
}

puts ready
flush stdout
gets stdin

set log [open $record a]
fconfigure $log -buffering none
lassign {0 0 0} attempts committed busy
while {$committed < $rows && [clock milliseconds] < $end} {
    incr attempts
    if {[catch {write [lindex {first second} [expr {$committed % 2}]] $committed} message]} {
        if {![string match *locked* $message]} { error $message }
        incr busy
        continue
    }
    puts -nonewline $log "$worker $committed\n" ;# one write: others append to it, too
    incr committed
}

while {[catch {first onecolumn {SELECT count(*) FROM rows WHERE worker = $worker}} seen]} {
    if {![string match *locked* $seen] || [clock milliseconds] > $end} { error $seen }
    incr busy
}
set version [first onecolumn {SELECT sqlite_version()}]
second close
first close
puts "{\"worker\": \"$worker\", \"attempts\": $attempts, \"committed\": $committed, \"busy\": $busy, \"seen\": $seen,\
    \"client\": \"Tcl [info patchlevel]\", \"sqlite\": \"$version\", \"status\": \[[join $status ", "]\]}"
