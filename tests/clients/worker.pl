# A client in Perl: DBD::SQLite. See README.md.
use strict;
use warnings;
use DBI;
use IO::Handle;
use JSON::PP;
use Time::HiRes qw(time);

my ($path, $worker, $rows, $record) = @ARGV;
my $end = time + ($ENV{WORKER_SECONDS} // 60);

sub connect_to {
    my ($load) = @_;
    my $db = DBI->connect("dbi:SQLite:dbname=$path", '', '', { RaiseError => 1, PrintError => 0, AutoCommit => 1 });
    $db->sqlite_busy_timeout(0);
    if ($load) {
        $db->sqlite_enable_load_extension(1);
        $db->sqlite_load_extension($load) or die "load_extension: " . $db->errstr;
    }
    return $db;
}

my @both = (connect_to($ENV{TURNSTILE_EXTENSION}), connect_to());
my @status = map { my ($answer) = $_->selectrow_array('PRAGMA turnstile_status'); $answer } @both;
my @inserts = map { $_->prepare('INSERT INTO rows VALUES(?, ?)') } @both;

# Every other pair of rows is written in a transaction of its own.
sub write_row {
    my ($i, $seq) = @_;
    return $inserts[$i]->execute($worker, $seq) if $seq % 4 < 2;
    $both[$i]->begin_work;
    return 1 if eval { $inserts[$i]->execute($worker, $seq); $both[$i]->commit; 1 };
    my $error = $@;
    $both[$i]->rollback;
    die $error;
}

STDOUT->autoflush(1);
print "ready\n";
<STDIN>;

my ($attempts, $committed, $busy) = (0, 0, 0);
open(my $log, '>>', $record) or die "$record: $!";
while ($committed < $rows && time < $end) {
    $attempts++;
    if (!eval { write_row($committed % 2, $committed); 1 }) {
        die $@ unless $@ =~ /locked/;
        $busy++;
        next;
    }
    syswrite($log, "$worker $committed\n") or die "$record: $!";
    $committed++;
}

my $seen;
until (defined $seen) {
    $seen = eval { ($both[0]->selectrow_array('SELECT count(*) FROM rows WHERE worker = ?', undef, $worker))[0] };
    next if defined $seen;
    die $@ if $@ !~ /locked/ || time > $end;
    $busy++;
}
my $sqlite = $both[0]->{sqlite_version};
@inserts = ();
$_->disconnect for reverse @both;
print encode_json({
    worker => $worker, attempts => $attempts, committed => $committed, busy => $busy, seen => $seen,
    client => "DBD::SQLite $DBD::SQLite::VERSION", sqlite => $sqlite, status => \@status,
}), "\n";
