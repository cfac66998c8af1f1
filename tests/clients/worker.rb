# A client in Ruby: the gem sqlite3. See README.md.
require 'json'
require 'sqlite3'

path, worker, rows, record = ARGV
finish = Process.clock_gettime(Process::CLOCK_MONOTONIC) + ENV.fetch('WORKER_SECONDS', '60').to_f
in_time = -> { Process.clock_gettime(Process::CLOCK_MONOTONIC) < finish }

first = SQLite3::Database.new(path)
if (extension = ENV['TURNSTILE_EXTENSION'])
  first.enable_load_extension(true)
  first.load_extension(extension)
  first.enable_load_extension(false)
end
both = [first, SQLite3::Database.new(path)]
status = both.map { |db| db.get_first_value('PRAGMA turnstile_status') }

# Every other pair of rows is written in a transaction of its own, which the gem rolls back for an exception.
def write(db, worker, seq)
  insert = -> { db.execute('INSERT INTO rows VALUES(?, ?)', [worker, seq]) }
  seq % 4 > 1 ? db.transaction { insert.call } : insert.call
end

puts 'ready'
$stdout.flush
$stdin.gets

attempts = committed = busy = 0
log = File.open(record, 'a')
while committed < rows.to_i && in_time.call
  attempts += 1
  begin
    write(both[committed % 2], worker, committed)
  rescue SQLite3::BusyException
    busy += 1
    next
  end
  log.syswrite("#{worker} #{committed}\n")
  committed += 1
end

begin
  seen = first.get_first_value('SELECT count(*) FROM rows WHERE worker = ?', [worker])
rescue SQLite3::BusyException
  raise unless in_time.call
  busy += 1
  retry
end
sqlite = first.get_first_value('SELECT sqlite_version()')
both.reverse_each(&:close)
puts JSON.generate(worker: worker, attempts: attempts, committed: committed, busy: busy, seen: seen,
                   client: "Ruby #{RUBY_VERSION}, sqlite3 #{SQLite3::VERSION}",
                   sqlite: sqlite, status: status)
