// A client in Java: JDBC. See README.md.

import java.io.BufferedReader;
import java.io.FileOutputStream;
import java.io.InputStreamReader;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import org.sqlite.SQLiteConfig;

class Worker {
    static Connection connect(String path, String extension) throws SQLException {
        SQLiteConfig config = new SQLiteConfig();
        config.enableLoadExtension(extension != null);
        Connection db = config.createConnection("jdbc:sqlite:" + path);
        if (extension != null) {
            try (PreparedStatement load = db.prepareStatement("SELECT load_extension(?)")) {
                load.setString(1, extension);
                load.executeQuery();
            }
        }
        return db;
    }

    static String scalar(Connection db, String sql) throws SQLException {
        try (Statement statement = db.createStatement()) {
            if (!statement.execute(sql)) return null;
            try (ResultSet rows = statement.getResultSet()) {
                return rows.next() ? rows.getString(1) : null;
            }
        }
    }

    static String quoted(String text) {
        return text == null ? "null" : '"' + text.replace("\\", "\\\\").replace("\"", "\\\"") + '"';
    }

    static boolean isBusy(SQLException e) {
        return e.getMessage().contains("locked");
    }

    /** Every other pair of rows is written in a transaction of its own. */
    static void insert(Connection db, String worker, int seq) throws SQLException {
        boolean transaction = seq % 4 > 1;
        if (transaction) db.setAutoCommit(false);
        try (PreparedStatement statement = db.prepareStatement("INSERT INTO rows VALUES(?, ?)")) {
            statement.setString(1, worker);
            statement.setInt(2, seq);
            statement.executeUpdate();
            if (transaction) db.commit();
        } catch (SQLException e) {
            if (transaction) db.rollback();
            throw e;
        } finally {
            if (transaction) db.setAutoCommit(true);
        }
    }

    public static void main(String[] arguments) throws Exception {
        String path = arguments[0], worker = arguments[1];
        int rows = Integer.parseInt(arguments[2]);
        String seconds = System.getenv("WORKER_SECONDS");
        long end = System.currentTimeMillis() + (long) (1000 * Double.parseDouble(seconds == null ? "60" : seconds));
        Connection[] both = {connect(path, System.getenv("TURNSTILE_EXTENSION")), connect(path, null)};
        String[] status = new String[2];
        for (int i = 0; i < 2; i++) status[i] = quoted(scalar(both[i], "PRAGMA turnstile_status"));

        System.out.println("ready");
        new BufferedReader(new InputStreamReader(System.in)).readLine();

        int attempts = 0, committed = 0, busy = 0;
        try (FileOutputStream log = new FileOutputStream(arguments[3], true)) {
            while (committed < rows && System.currentTimeMillis() < end) {
                attempts++;
                try {
                    insert(both[committed % 2], worker, committed);
                } catch (SQLException e) {
                    if (!isBusy(e)) throw e;
                    busy++;
                    continue;
                }
                log.write((worker + " " + committed + "\n").getBytes());
                committed++;
            }
        }
        String seen = null;
        while (seen == null) {
            try {
                seen = scalar(both[0], "SELECT count(*) FROM rows WHERE worker = '" + worker + "'");
            } catch (SQLException e) {
                if (!isBusy(e) || System.currentTimeMillis() > end) throw e;
                busy++;
            }
        }
        String client = "sqlite-jdbc " + both[0].getMetaData().getDriverVersion() + ", Java " + System.getProperty("java.version");
        String sqlite = both[0].getMetaData().getDatabaseProductVersion();
        both[1].close();
        both[0].close();
        System.out.printf("{\"worker\": \"%s\", \"attempts\": %d, \"committed\": %d, \"busy\": %d, \"seen\": %s, "
            + "\"client\": \"%s\", \"sqlite\": \"%s\", \"status\": [%s, %s]}%n",
            worker, attempts, committed, busy, seen, client, sqlite, status[0], status[1]);
    }
}
