# A pool of workers in Ruby, as job runners of Rails fork them: each takes the next job, does it and writes down its result,
# in one transaction that begins by reading. See README.md.
#
#     pool.rb DATABASE RECORD WORKERS SECONDS         prints jobs done and transactions refused
require 'sqlite3'

path, record, workers, seconds = ARGV
finish = Process.clock_gettime(Process::CLOCK_MONOTONIC) + seconds.to_f

def connect(path)
  db = SQLite3::Database.new(path)
  db.busy_timeout(5000) # `timeout: 5000` of database.yml
  db
end

# Takes a job, or says that there is none.
def take(db, worker)
  job = nil
  db.transaction do
    job, = db.get_first_row('SELECT seq FROM jobs WHERE worker IS NULL ORDER BY seq LIMIT 1')
    next unless job

    db.execute('UPDATE jobs SET worker = ? WHERE seq = ?', [worker, job])
    db.execute('INSERT INTO rows VALUES(?, ?)', [worker, job])
  end
  job
end

def run(path, record, worker, finish)
  db = connect(path)
  log = File.open(record, 'a')
  taken = refused = 0
  while Process.clock_gettime(Process::CLOCK_MONOTONIC) < finish
    begin
      job = take(db, worker)
    rescue SQLite3::BusyException
      refused += 1
      next
    end
    break unless job

    log.syswrite("#{worker} #{job}\n")
    taken += 1
  end
  db.close
  [taken, refused]
end

read, write = IO.pipe
workers.to_i.times do |i|
  fork do
    read.close
    write.syswrite("#{run(path, record, "ruby-#{i}", finish).join(' ')}\n")
  end
end
write.close
all = read.readlines.map { |line| line.split.map(&:to_i) }
Process.waitall
abort "#{all.size} of #{workers} workers came to their end" if all.size != workers.to_i
puts all.transpose.map(&:sum).join(' ')
